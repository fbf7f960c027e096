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

// 2 W halves of 16 bits as floats; only where W is 16.
template <class L, class V>
INLINE void halves_as_floats(L both, V& low, V& high) {
  low.v = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
  high.v = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
}
// a and b as 2 W numbers of type f16, in their order.
template <class V>
INLINE auto two_as_f16(V a, V b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(to_f16(a)), to_f16(b), 1);
}

// For a search in tables of 32 words, which two registers hold; only where W is 16. The integer
// below a * by + from, in the low bits, for a `from` past 1.5 * 2^23.
template <class V>
INLINE Words floored(V a, float by, float from) {
  constexpr int kDown = 9;  // to -infinity, without exceptions
  return (Words)_mm512_fmadd_round_ps(a.v, V(set1(by)).v, V(set1(from)).v, kDown);
}
// Entry i for the five low bits i of each lane.
template <class L>
INLINE L lookup_32(const L (&table)[2], L index) {
  return _mm512_permutex2var_epi32(table[0], index, table[1]);
}
// x, shifted down by four bits where a is above a limit.
template <class L, class V>
INLINE L shifted_above(L x, V a, L limit) {
  const auto above = _mm512_cmp_ps_mask(a.v, (decltype(a.v))limit, 30);  // greater, ordered, quiet
  return _mm512_mask_srli_epi32(x, above, x, 4);
}
