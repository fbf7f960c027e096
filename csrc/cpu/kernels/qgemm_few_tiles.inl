// For qgemm_few.inl: products of tiles of codes and tiles of tokens, and what both are made of.

constexpr i64 kFewTokens = 64, kFewRows = 64;  // tokens packed at a time; rows of a task
constexpr i64 kSteps = 4;  // tiles of a row's block: 128 numbers of nibbles, 256 of bytes
constexpr i64 kTileWords = W * W, kByteBlock = 256;

// c [folds][4][16][16]: what four tiles of rows and a tile of columns make of each fold of a block.
// a [4][kSteps][P] tiles of codes in P planes, b [kSteps][T] tiles of tokens in T terms.
template <int P, int T>
APART void code_tiles(i64 folds, const float* a, const float* b, float* c) {
  constexpr i64 kRow = kSteps * P * kTileWords;
  const i64 steps = kSteps / folds;
  for (i64 f = 0; f < folds; ++f, c += 4 * kTileWords) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (i64 s = 0; s < steps; ++s, a += P * kTileWords, b += T * kTileWords) {
      _tile_loadd(5, b, 64);
      if constexpr (T > 1) _tile_loadd(6, b + kTileWords, 64);
      if constexpr (T > 2) _tile_loadd(7, b + 2 * kTileWords, 64);
#define FASTLLM_ROW(sum)                                               \
  _tile_loadd(4, a + sum * kRow, 64);                                  \
  _tile_dpbf16ps(sum, 4, 5);                                           \
  if constexpr (T > 1) _tile_dpbf16ps(sum, 4, 6);                      \
  if constexpr (T > 2) _tile_dpbf16ps(sum, 4, 7);                      \
  if constexpr (P > 1) {                                               \
    _tile_loadd(4, a + sum * kRow + kTileWords, 64);                   \
    _tile_dpbf16ps(sum, 4, 5);                                         \
  }
      FASTLLM_ROW(0)
      FASTLLM_ROW(1)
      FASTLLM_ROW(2)
      FASTLLM_ROW(3)
#undef FASTLLM_ROW
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + kTileWords, 64);
    _tile_stored(2, c + 2 * kTileWords, 64);
    _tile_stored(3, c + 3 * kTileWords, 64);
  }
}

// c [4][16][16] of int32: four tiles of rows, a [4][kSteps] tiles, times a tile of columns, b
// [kSteps] tiles, of bytes.
APART void digit_tiles(const float* a, const float* b, float* c) {
  constexpr i64 kRow = kSteps * kTileWords;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
#pragma GCC unroll 4
  for (i64 s = 0; s < kSteps; ++s, a += kTileWords, b += kTileWords) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(5, a + kRow, 64);
    _tile_dpbssd(1, 5, 6);
    _tile_loadd(4, a + 2 * kRow, 64);
    _tile_dpbssd(2, 4, 6);
    _tile_loadd(5, a + 3 * kRow, 64);
    _tile_dpbssd(3, 5, 6);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + kTileWords, 64);
  _tile_stored(2, c + 2 * kTileWords, 64);
  _tile_stored(3, c + 3 * kTileWords, 64);
}

// W numbers of a row, zeros behind its end (behind rounded ones they lie there).
template <class X>
INLINE Vec numbers_at(const X* x, i64 left) {
  if constexpr (std::is_same_v<X, int8_t>)
    return to_float(bytes_as_words(x));
  else
    return left >= W ? load(x) : load(x, int(most(0, left)));
}

// 32 numbers of a row as pairs of bf16, in the order of Planes; zeros behind its end. term: which
// one of `terms`.
template <class X>
INLINE Vec pairs_of(const X* x, i64 left, [[maybe_unused]] int term, [[maybe_unused]] int terms) {
  Vec pairs;
  if constexpr (std::is_same_v<X, bf16>) {
    pairs = load_pairs(x, int(least(32, most(0, left))));
  } else {
    Vec v[2];
    for (int h = 0; h < 2; ++h) {
      v[h] = numbers_at(x + h * W, left - h * W);
      const auto cut = [](Vec a) { return from_bits(bits_of(a) & int32_t(0xffff0000)); };
      for (int t = 0; t < term; ++t) v[h] = v[h] - cut(v[h]);
      if (term + 1 < terms) v[h] = cut(v[h]);
    }
    pairs = paired(v[0], v[1]);
  }
  return in_nibble_order(pairs);
}

// Codes looked up as bf16, in P planes; P = 0: bytes, as they are.
template <int P>
struct Planes {
  Halves table[P ? P : 1];
  explicit INLINE_MEMBER Planes(int kind) {
    float left[16];
    for (int i = 0; i < 16; ++i)
      left[i] = kind == kInt4 ? float(i - 8) : kind == kNf4 ? kNf4Values[i] : kFp4Values[i];
    for (int p = 0; p < P; ++p) {
      uint16_t halves[32];
      for (int i = 0; i < 16; ++i) {
        const Vec top = rounded((const bf16*)nullptr, set1(left[i]));
        alignas(64) float value[W];
        store(value, top);
        uint32_t bits;
        __builtin_memcpy(&bits, value, 4);
        halves[i] = halves[i + 16] = uint16_t(bits >> 16);
        left[i] -= value[0];
      }
      table[p] = load_halves(halves);
    }
  }
  // 128 nibbles of a row as the rows of kSteps tiles.
  INLINE_MEMBER void decode(const uint8_t* codes, float* out) const {
#pragma GCC unroll 4
    for (int s = 0; s < kSteps; ++s)
#pragma GCC unroll 3
      for (int p = 0; p < P; ++p)
        store_halves(out + (s * P + p) * kTileWords,
                     picked(table[p], spread_nibbles(codes + 16 * s)));
  }
};

// Digits that hold what tokens of T do, if their largest number is at most so many times the mean
// of its block: what is lost is 2^-8 D of the largest.
template <class T>
APART int digits_for(const T* x, i64 k) {
  constexpr bool kWide = std::is_same_v<T, float>;
  int digits = kWide ? 3 : 2;
  for (i64 at = 0; at < k; at += kByteBlock) {
    const i64 n = least(kByteBlock, k - at);
    const float top = largest(x + at, n);
    Vec sum = zero();
    sweep(n, [&](auto lanes, i64 i, int) INLINE_LAMBDA {
      sum = sum + from_bits(bits_of(get(x + at + i, lanes)) & 0x7fffffff);
    });
    const float mean = hsum(sum) / float(n);
    if (!(top < 0x1p100f) || (top > 0.0f && top < 0x1p-90f) || top > 1000.0f * mean) return 0;
    if (top > (kWide ? 6.5f : 12.0f) * mean) digits = kWide ? 4 : 3;
  }
  return digits;
}
