// A few tokens by codes that dot products take without decoding: bytes, and nibbles 128 at a time.
//
// 64 bytes hold 128 nibbles; word i of them stands for elements 8 i to 8 i + 7 of the block. Tokens
// are dealt out to match, so that no nibble has to move between lanes.

constexpr i64 kDealt = 128;

// Rows of bytes with one scale: w + 128 is the unsigned side, the tokens' sums make up for it.
template <int M>
INLINE void thin_bytes(const Weight& w, i64 row, const ThinCodes& x, float* out) {
  IntVec sum[M][2] = {};
  const uint8_t* p = w.codes + row * w.row;
  const IntVec flip = IntVec{} + int32_t(0x80808080);
  for (i64 i = 0; i < w.k; i += 128) {
    const IntVec a = load_codes(p + i, w.k - i) ^ flip, b = load_codes(p + i + 64, w.k - i - 64) ^ flip;
    __builtin_prefetch((const void*)(uintptr_t(p + i) + 2048));
    __builtin_prefetch((const void*)(uintptr_t(p + i) + 2112));
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const int8_t* codes = x.codes + m * x.width + i;
      sum[m][0] = dot_bytes(a, load_words(codes), sum[m][0]);
      sum[m][1] = dot_bytes(b, load_words(codes + 64), sum[m][1]);
    }
  }
  const float scale = scale_at(w.scales, w.scale_type, scale_index(w, row, 0));
  for (int m = 0; m < M; ++m) {
    const uint32_t all = uint32_t(sum_words(sum[m][0] + sum[m][1]));
    out[m] = float(int32_t(all - 128u * uint32_t(x.sums[m]))) * scale * x.scales[m];
  }
}

// Tokens for nibbles: [blocks][2][64] codes, the even elements of a block and the odd ones, or
// [blocks][4][32] bf16, every fourth element from 0, 1, 2 and 3 on; and their sums, word by word.
struct Dealt {
  const void* values;
  const float* sums;  // [M][blocks][16]
  const float* scales;
  i64 blocks;
};

INLINE IntVec lanes_of_groups(i64 group) {
  IntVec spread;
  for (int i = 0; i < W; ++i) spread[i] = int32_t(i * 8 / group);
  return spread;
}

// Sums of a block's nibbles (0 to 15) times a token's elements, in fp32, word by word.
struct NibblesByCodes {
  template <int M>
  INLINE_MEMBER static void block(IntVec v, const Dealt& x, i64 b, Vec (&out)[M]) {
    const IntVec even = low_nibbles(v), odd = low_nibbles(v >> 4);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const int8_t* codes = (const int8_t*)x.values + (m * x.blocks + b) * kDealt;
      const IntVec first = dot_bytes(even, load_words(codes), IntVec{});
      out[m] = to_float(dot_bytes(odd, load_words(codes + 64), first));
    }
  }
  static constexpr float kOver = 0.0f;  // added to each nibble
};

#if defined(FASTLLM_DOTS)
// bf16 of 128 + n has n as its last bits: four ors make 128 nibbles numbers.
struct NibblesByPairs {
  template <int M>
  INLINE_MEMBER static void block(IntVec v, const Dealt& x, i64 b, Vec (&out)[M]) {
    const IntVec mask = IntVec{} + 0x000f000f, high = IntVec{} + 0x43004300;
    Vec n[4];
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) n[s] = from_bits(((v >> (4 * s)) & mask) | high);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const bf16* values = (const bf16*)x.values + (m * x.blocks + b) * kDealt;
      Vec sum[2] = {zero(), zero()};
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s)
        sum[s % 2] = dot_pairs(n[s], load((const float*)(values + 32 * s)), sum[s % 2]);
      out[m] = sum[0] + sum[1];
    }
  }
  static constexpr float kOver = 128.0f;
};
#endif

// int4 in groups of 32, 64 or a multiple of 128.
template <int M, class Dot>
INLINE void thin_nibbles(const Weight& w, i64 row, const Dealt& x, float* out) {
  const uint8_t* p = w.codes + row * w.row;
  const i64 bytes = (w.k + 1) / 2, group = w.group, groups = ceil_div(w.k, group);
  const bool wide = w.scale_type == kScaleFloat32;
  const IntVec spread = lanes_of_groups(group);
  const i64 first = scale_index(w, row, 0), size = wide ? 4 : 2;
  Vec total[M];
  for (int m = 0; m < M; ++m) total[m] = zero();
  for (i64 b = 0; b < x.blocks; ++b) {
    const i64 g = b * kDealt / group;
    const Vec scale =
        load_four((const uint8_t*)w.scales + (first + g) * size, wide, groups - g, spread);
    Vec over = set1(8.0f + Dot::kOver);
    if (w.zeros)
      over = load_four((const uint8_t*)w.zeros + (first + g) * size, wide, groups - g, spread) +
             set1(Dot::kOver);
    const IntVec v = load_codes(p + b * 64, bytes - b * 64);
    __builtin_prefetch((const void*)(uintptr_t(p + b * 64) + 2048));
    Vec sums[M];
    Dot::template block<M>(v, x, b, sums);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Vec held = load(x.sums + (m * x.blocks + b) * W);
      total[m] = fma(fma(zero() - over, held, sums[m]), scale, total[m]);
    }
  }
  for (int m = 0; m < M; ++m) out[m] = hsum(total[m]) * x.scales[m];
}

// ---- tokens, dealt out

APART void deal_codes(const int8_t* codes, i64 blocks, int8_t* out, float* sums) {
  for (i64 b = 0; b < blocks; ++b, codes += kDealt, out += kDealt)
    for (int i = 0; i < W; ++i) {
      int32_t sum = 0;
      for (int j = 0; j < 4; ++j) {
        out[4 * i + j] = codes[8 * i + 2 * j];
        out[64 + 4 * i + j] = codes[8 * i + 2 * j + 1];
        sum += codes[8 * i + 2 * j] + codes[8 * i + 2 * j + 1];
      }
      sums[b * W + i] = float(sum);
    }
}

// False where numbers are so large that 128 times them, taken away again, would leave a trace.
APART bool deal_pairs(const bf16* x, i64 k, i64 blocks, bf16* out, float* sums) {
  constexpr uint32_t kLarge = (127 + 100) << 7;  // 2^100 as bf16
  bool small = true;
  for (i64 b = 0; b < blocks; ++b, out += kDealt)
    for (int i = 0; i < W; ++i) {
      float sum = 0;
      for (int j = 0; j < 8; ++j) {
        const i64 at = b * kDealt + 8 * i + j;
        const bf16 value = at < k ? x[at] : bf16{0};
        out[j % 4 * 32 + 2 * i + j / 4] = value;
        small = small && (value.bits & 0x7fffu) < kLarge;
        const uint32_t bits = uint32_t(value.bits) << 16;
        float number;
        __builtin_memcpy(&number, &bits, 4);
        sum += number;
      }
      sums[b * W + i] = sum;
    }
  return small;
}

// Whether nibbles of this weight can meet dealt tokens.
INLINE bool dealable(const Weight& w) {
  const bool groups = w.group == 32 || w.group == 64 || (w.group > 0 && w.group % kDealt == 0);
  return w.kind == kInt4 && groups && w.scale_block == 1 && w.scale_type <= kScaleBFloat16;
}
