// Bytes of four vectors at once: packed where there are instructions for it, one by one elsewhere.
// The vectors' type is a parameter so that only the branch of the level is compiled.
#pragma once

// Four vectors' lanes as bytes in their order; each is within a signed byte.
template <class L>
INLINE L as_bytes(L a, L b, L c, L d) {
  constexpr int32_t kOrder[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  constexpr int32_t kHalfOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  L order = a;
  if constexpr (W == 16) {
    __builtin_memcpy(&order, kOrder, sizeof(order));
    const L low = _mm512_packs_epi32(a, b), high = _mm512_packs_epi32(c, d);
    return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
  } else if constexpr (W == 8) {
    __builtin_memcpy(&order, kHalfOrder, sizeof(order));
    const L low = _mm256_packs_epi32(a, b), high = _mm256_packs_epi32(c, d);
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
  } else {
    uint8_t each[4 * W];
    store_bytes(each, a);
    store_bytes(each + W, b);
    store_bytes(each + 2 * W, c);
    store_bytes(each + 3 * W, d);
    __builtin_memcpy(&order, each, sizeof(order));
    return order;
  }
}

template <class L>
INLINE void store_bytes(uint8_t* p, L a, L b, L c, L d) {
  const L each = as_bytes(a, b, c, d);
  __builtin_memcpy(p, &each, sizeof(each));
}

// Two lanes a byte, the even one low; each is below 16.
template <class L>
INLINE void store_nibbles(uint8_t* p, L a, L b, L c, L d) {
  const L each = as_bytes(a, b, c, d);
  if constexpr (W == 16) {
    const auto both = _mm512_cvtepi16_epi8(_mm512_or_si512(each, _mm512_srli_epi16(each, 4)));
    __builtin_memcpy(p, &both, sizeof(both));
  } else {
    typedef uint16_t Pairs __attribute__((vector_size(4 * W)));
    typedef uint8_t Packed __attribute__((vector_size(2 * W)));
    Pairs pairs;
    __builtin_memcpy(&pairs, &each, sizeof(pairs));
    const Packed both = __builtin_convertvector((pairs | pairs >> 4) & 0xff, Packed);
    __builtin_memcpy(p, &both, sizeof(both));
  }
}

// Numbers of 16 bits, picked from as many by the low bits of each index; only where W is 16. (The
// compiler's own shuffle takes two tables, which is three times as much work.)
template <class L>
INLINE L pick_halves(L table, L index) {
  return _mm512_permutexvar_epi16(index, table);
}
