// Steps on codes whose rows have one scale, by dot products of bytes. Queries, and then weights,
// become 16-bit integers of a row's own scale, of which the signed digits meet unsigned codes: far
// closer than a query of 16 bits is to its own number, while all sums are exact.
#include FASTLLM_WORDS

#include "cpu/simd/words_vnni.h"

constexpr i64 kBytes = 64;           // of a vector
constexpr float kDigits = 32512.0f;  // the largest integer: its digits are 127 and 0

// Numbers x in units of `scale` as x = 256 high + low; returns the sum of the integers.
INLINE int32_t split_digits(const float* x, float scale, i64 n, int8_t* high, int8_t* low) {
  const Vec inverse = set1(scale > 0 ? 1.0f / scale : 0.0f);
  IntVec sum = {};
  for (i64 i = 0; i < n; i += W) {
    const IntVec all = nearest(load(x + i) * inverse), last = ((all + 128) & 255) - 128;
    store_bytes((uint8_t*)high + i, (__m512i)((all - last) >> 8));
    store_bytes((uint8_t*)low + i, (__m512i)last);
    sum += all;
  }
  return sum_words(sum);
}
// What the largest of n numbers, or NaN if one is, makes the unit of.
INLINE float unit_of(const float* x, i64 n) {
  IntVec top = {};
  for (i64 i = 0; i < n; i += W) {
    const IntVec size = load_words(x + i) & 0x7fffffff;
    top = size > top ? size : top;
  }
  const uint32_t bits = top_bits({(Floats)top});
  float most;
  __builtin_memcpy(&most, &bits, 4);
  return most / kDigits;
}

// A row of queries: digits of `padded` numbers in the order of their places, and what they are of.
struct DigitRow {
  int8_t* high;
  float* scale;
  int32_t* sum;
  DigitRow(float* row, i64 padded)
      : high((int8_t*)row), scale(row + padded - 2), sum((int32_t*)row + padded - 1) {}
};
void split_query(float* row, i64 padded) {
  float numbers[kMostNumbers];
  __builtin_memcpy(numbers, row, padded * 4);
  const DigitRow to(row, padded);
  const float scale = unit_of(numbers, padded);
  const int32_t sum = split_digits(numbers, scale, padded, to.high, to.high + padded);
  *to.scale = scale, *to.sum = sum;
}

// How codes are read as unsigned bytes, 64 of them at a time: those of part 0, or 1.
struct DigitBytes {
  static constexpr int kParts = 1, kZero = 128;
  template <int Part>
  INLINE_MEMBER static IntVec part(IntVec codes) {
    return codes ^ int32_t(0x80808080);
  }
};
struct DigitNibbles {
  static constexpr int kParts = 2, kZero = 8;
  template <int Part>
  INLINE_MEMBER static IntVec part(IntVec codes) {
    return low_nibbles(Part ? codes >> 4 : codes);
  }
};

// Of each 128 bits of x and y: two sums of x next to two of y.
INLINE __m512i pair_sums(IntVec x, IntVec y) {
  return _mm512_add_epi32(_mm512_unpacklo_epi32((__m512i)x, (__m512i)y),
                          _mm512_unpackhi_epi32((__m512i)x, (__m512i)y));
}
// The sums of four vectors.
INLINE __m128i sum_four(const IntVec (&a)[4]) {
  const __m512i x = pair_sums(a[0], a[1]), y = pair_sums(a[2], a[3]);
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(x, y), _mm512_unpackhi_epi64(x, y));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all),
                                        _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// Products of some keys, from r on, with some queries, from i on.
template <class S, int Keys, int Queries>
INLINE void digit_products(const Step& s, i64 r, i64 i) {
  IntVec high[Queries][4] = {}, low[Queries][4] = {};
  const char* k = s.from + r * s.stride;
  const i64 bytes = ceil_div(s.width, S::kParts);
  for (i64 at = 0; at < bytes; at += kBytes) {
    IntVec codes[Keys];
#pragma GCC unroll 4
    for (int j = 0; j < Keys; ++j) codes[j] = load_codes(k + j * s.stride + at, bytes - at);
    const auto add = [&](auto part) INLINE_LAMBDA {
      constexpr int kPart = decltype(part)::value;
      IntVec key[Keys];
#pragma GCC unroll 4
      for (int j = 0; j < Keys; ++j) key[j] = S::template part<kPart>(codes[j]);
#pragma GCC unroll 2
      for (int l = 0; l < Queries; ++l) {
        const int8_t* q = DigitRow(s.numbers + (i + l) * s.padded, s.padded).high;
        const IntVec h = load_words(q + at * S::kParts + kPart * kBytes);
        const IntVec w = load_words(q + s.padded + at * S::kParts + kPart * kBytes);
#pragma GCC unroll 4
        for (int j = 0; j < Keys; ++j) {
          high[l][j] = dot_bytes(key[j], h, high[l][j]);
          low[l][j] = dot_bytes(key[j], w, low[l][j]);
        }
      }
    };
    add(std::integral_constant<int, 0>{});
    if constexpr (S::kParts == 2) add(std::integral_constant<int, 1>{});
  }
#pragma GCC unroll 2
  for (int l = 0; l < Queries; ++l) {
    const DigitRow row(s.numbers + (i + l) * s.padded, s.padded);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) low[l][j] += high[l][j] << 8;
    const __m128i whole =
        _mm_sub_epi32(sum_four(low[l]), _mm_set1_epi32(int(uint32_t(*row.sum) * S::kZero)));
    const __m128 four = _mm_mul_ps(_mm_cvtepi32_ps(whole), _mm_set1_ps(*row.scale));
    float* to = s.weights + (i + l) * kGlance + r;
    if (Keys == 4)
      _mm_storeu_ps(to, four);
    else
      *to = _mm_cvtss_f32(four);
  }
}
template <class S, int Queries>
INLINE void digit_scores(const Step& s, i64 i) {
  i64 r = 0;
  for (; r + 4 <= s.n; r += 4) {
    if (i == 0 && s.next) ask(s, r, 4);
    digit_products<S, 4, Queries>(s, r, i);
  }
  for (; r < s.n; ++r) digit_products<S, 1, Queries>(s, r, i);
}
template <class S>
APART void digit_score_step(const Step& s) {
  i64 i = 0;
  for (; i + 2 <= s.rows; i += 2) digit_scores<S, 2>(s, i);
  for (; i < s.rows; ++i) digit_scores<S, 1>(s, i);
}

// Weights of a step in digits.
struct DigitWeights {
  alignas(64) int8_t high[kGlance], low[kGlance];
  float scale;
  int32_t zero;  // what all of them add where codes are 0 too large
};

template <bool Upper>
INLINE __m512i zip_bytes(__m512i a, __m512i b) {
  return Upper ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b);
}
// Sums of some queries += weights times values: half of the columns of 64 bytes from `at` on.
template <class S, int Part, bool Upper, int Queries>
INLINE void digit_mix_half(const Step& s, const DigitWeights* weights, i64 i, i64 at, bool asks) {
  const i64 bytes = ceil_div(s.width, S::kParts);
  IntVec high[Queries][2] = {}, low[Queries][2] = {};
  for (i64 r = 0; r < s.n; r += 4) {
    if (asks) ask(s, r, int(least(4, s.n - r)));
    __m512i row[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const i64 n = r + j < s.n ? bytes - at : 0;
      row[j] = (__m512i)S::template part<Part>(load_codes(s.from + (r + j) * s.stride + at, n));
    }
    const __m512i first = zip_bytes<Upper>(row[0], row[1]);
    const __m512i second = zip_bytes<Upper>(row[2], row[3]);
    const IntVec value[2] = {(IntVec)_mm512_unpacklo_epi16(first, second),
                             (IntVec)_mm512_unpackhi_epi16(first, second)};
#pragma GCC unroll 4
    for (int l = 0; l < Queries; ++l) {
      int32_t four[2];
      __builtin_memcpy(four, weights[l].high + r, 4);
      __builtin_memcpy(four + 1, weights[l].low + r, 4);
      const IntVec h = IntVec{} + four[0], w = IntVec{} + four[1];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        high[l][j] = dot_bytes(value[j], h, high[l][j]);
        low[l][j] = dot_bytes(value[j], w, low[l][j]);
      }
    }
  }
#pragma GCC unroll 4
  for (int l = 0; l < Queries; ++l)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      float* out = s.numbers + (i + l) * s.padded + at * S::kParts + Part * kBytes +
                   (2 * Upper + j) * W;
      const IntVec whole = (high[l][j] << 8) + low[l][j] - weights[l].zero;
      store(out, fma(to_float(whole), set1(weights[l].scale), load(out)));
    }
}
template <class S, int Queries>
INLINE void digit_mix(const Step& s, const DigitWeights* weights, i64 i) {
  const i64 bytes = ceil_div(s.width, S::kParts);
  for (i64 at = 0; at < bytes; at += kBytes) {
    digit_mix_half<S, 0, false, Queries>(s, weights, i, at, s.next && i == 0 && at == 0);
    digit_mix_half<S, 0, true, Queries>(s, weights, i, at, false);
    if constexpr (S::kParts == 2) {
      digit_mix_half<S, 1, false, Queries>(s, weights, i, at, false);
      digit_mix_half<S, 1, true, Queries>(s, weights, i, at, false);
    }
  }
}
template <class S>
APART void digit_mix_step(const Step& s) {
  DigitWeights weights[kFewQueries];
  const i64 n = ceil_div(s.n, W) * W;
  for (i64 i = 0; i < s.rows; ++i) {
    float* row = s.weights + i * kGlance;
    for (i64 r = s.n; r < n; ++r) row[r] = 0.0f;
    weights[i].scale = unit_of(row, n);
    const uint32_t sum = split_digits(row, weights[i].scale, n, weights[i].high, weights[i].low);
    weights[i].zero = int32_t(sum * uint32_t(S::kZero));
  }
  i64 i = 0;
  for (; i + 4 <= s.rows; i += 4) digit_mix<S, 4>(s, weights + i, i);
  for (; i < s.rows; ++i) digit_mix<S, 1>(s, weights + i, i);
}

// Where a block's number i is: of queries, then of sums, as unpacking leaves them.
template <class S>
int digit_place(int i) {
  return i % S::kParts * int(kBytes) + i / S::kParts;
}
template <class S>
int digit_sum_place(int i) {
  const int byte = i / S::kParts;
  return i % S::kParts * int(kBytes) + byte % 16 / 4 * W + byte / 16 * 4 + byte % 4;
}
template <class S>
constexpr Reader digits_of(i64 bits) {
  return {digit_score_step<S>, digit_mix_step<S>, split_query, digit_place<S>, digit_sum_place<S>,
          S::kParts * kBytes, bits, false};
}
