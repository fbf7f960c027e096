// A few tokens: each row of codes is read once, decoded in registers, at the speed of memory.

constexpr i64 kThinTokens = 4, kThinRows = 16;  // rows of the weight a task

// The tokens of a thin product with int8 activations.
struct ThinCodes {
  const int8_t* codes;  // [M][width]
  i64 width;
  const int32_t* sums;  // [M][groups]: of the codes of each `group` elements
  i64 group;
  const float* scales;  // [M]
};

// out[M] = one row of the weight times M tokens of `width` floats.
template <int M, class C>
APART void thin_floats(const Weight& w, i64 row, const float* x, i64 width, float* out) {
  const bool in_code = w.group != 0 || std::is_same_v<C, Nibbles>;
  Vec sum[M][2][kHalf / W];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int i = 0; i < 2 * kHalf / W; ++i) sum[m][i % 2][i / 2] = zero();
  const auto add = [&](const uint8_t* p, i64 i, const auto& s, int chain) INLINE_LAMBDA {
    HalfOf v;
    if (in_code)
      C::template values<true>(s, p, v);
    else
      C::template values<false>(s, p, v);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int j = 0; j < kHalf / W; ++j)
        sum[m][chain][j] = fma(v[j], load(x + m * width + i + j * W), sum[m][chain][j]);
  };
  each_half<C>(w, row, 0, width, [&](const uint8_t* p, i64 i, const auto& s) INLINE_LAMBDA {
    __builtin_prefetch((const void*)(uintptr_t(p) + 1024));
    if (i & kHalf)
      add(p, i, s, 1);
    else
      add(p, i, s, 0);
  });
  const float scale = in_code ? 1.0f : scale_at(w.scales, w.scale_type, scale_index(w, row, 0));
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    Vec total = zero();
#pragma GCC unroll 8
    for (int j = 0; j < kHalf / W; ++j) total = total + (sum[m][0][j] + sum[m][1][j]);
    out[m] = hsum(total) * scale;
  }
}

// Adds to sum the products of kHalf codes of a row with those of a token.
INLINE IntVec dot_half(const int8_t* w, const int8_t* x, IntVec sum) {
#pragma GCC unroll 8
  for (int i = 0; i < kHalf; i += 2 * W)
    sum = dot_shorts(bytes_as_shorts(w + i), bytes_as_shorts(x + i), sum);
  return sum;
}

template <int M, class C>
APART void thin_integers(const Weight& w, i64 row, const ThinCodes& x, float* out) {
  const i64 group = x.group, groups = ceil_div(w.k, group);
  float total[M] = {};
  for (i64 g = 0; g < groups; ++g) {
    IntVec sum[M] = {};
    const i64 from = g * group, count = least(group, w.k - from);
    each_half<C>(w, row, from, count, [&](const uint8_t* p, i64 i, const auto&) INLINE_LAMBDA {
      alignas(64) int8_t bytes[kHalf];
      if (std::is_same_v<C, Nibbles>) {
        nibbles_as_bytes(p, bytes);
        p = (const uint8_t*)bytes;
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
        sum[m] = dot_half((const int8_t*)p, x.codes + m * x.width + from + i, sum[m]);
    });
    const i64 at = scale_index(w, row, from);
    const float scale = scale_at(w.scales, w.scale_type, at), zero = zero_at(w, at) - 8.0f;
    for (int m = 0; m < M; ++m) {
      float part = float(sum_words(sum[m]));
      if (w.zeros) part -= zero * float(x.sums[m * groups + g]);
      total[m] += part * scale;
    }
  }
  for (int m = 0; m < M; ++m) out[m] = total[m] * x.scales[m];
}

#if defined(FASTLLM_BYTE_DOTS)
// R rows of bytes with one scale, [R][M]: w + 128 is the unsigned side, the tokens' sums make up
// for it.
template <int M, int R>
INLINE void thin_bytes(const Weight& w, i64 row, const ThinCodes& x, float* out) {
  IntVec sum[R][M][2] = {};
  const IntVec flip = IntVec{} + int32_t(0x80808080);
  for (i64 i = 0; i < w.k; i += 128)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint8_t* p = w.codes + (row + r) * w.row + i;
      const IntVec a = load_codes(p, w.k - i) ^ flip, b = load_codes(p + 64, w.k - i - 64) ^ flip;
      if (R == 1) {
        __builtin_prefetch((const void*)(uintptr_t(p) + 2048));
        __builtin_prefetch((const void*)(uintptr_t(p) + 2112));
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const int8_t* codes = x.codes + m * x.width + i;
        sum[r][m][0] = dot_bytes(a, load_words(codes), sum[r][m][0]);
        sum[r][m][1] = dot_bytes(b, load_words(codes + 64), sum[r][m][1]);
      }
    }
  for (int r = 0; r < R; ++r) {
    const float scale = scale_at(w.scales, w.scale_type, scale_index(w, row + r, 0));
    for (int m = 0; m < M; ++m) {
      const uint32_t all = uint32_t(sum_words(sum[r][m][0] + sum[r][m][1]));
      const float exact = float(int32_t(all - 128u * uint32_t(x.sums[m])));
      out[r * M + m] = exact * scale * x.scales[m];
    }
  }
}
#endif

// What a thin product has made of its tokens.
struct Thin {
  const float* values;  // [M][width], of kFloat
  ThinCodes codes;      // of the others
#if defined(FASTLLM_BYTE_DOTS)
  Dealt dealt;  // values null: not dealt out
#endif
};

template <int M, class C>
INLINE void thin_row(const Product& p, const Thin& x, i64 row, float* out) {
  if (p.activations == kFloat) return thin_floats<M, C>(p.w, row, x.values, x.codes.width, out);
  if constexpr (std::is_same_v<C, Int8Codes> || std::is_same_v<C, Nibbles>)
    thin_integers<M, C>(p.w, row, x.codes, out);
}

// out [M][kThinRows]: rows(r, number, sums) makes the sums [number][M] of rows from r on, R or one.
template <int M, int R, class F>
INLINE void each_row(i64 count, float* out, const F& rows) {
  i64 r = 0;
  const auto step = [&](auto number) INLINE_LAMBDA {
    constexpr int N = decltype(number)::value;
    float sums[N * M] = {};
    rows(r, number, sums);
    for (int i = 0; i < N; ++i)
      for (int m = 0; m < M; ++m) out[m * kThinRows + r + i] = sums[i * M + m];
    r += N;
  };
  while (R > 1 && r + R <= count) step(std::integral_constant<int, R>{});
  while (r < count) step(std::integral_constant<int, 1>{});
}

#if defined(FASTLLM_BYTE_DOTS)
// A token alone meets four rows at a time: memory is read faster in four places than in one. Floats
// of more than two tokens stay in the L1 cache a part of k at a time.
template <int M, class Dot>
APART void dealt_rows(const Product& p, const Dealt& x, i64 from, i64 count, float* out) {
  const Dot dot(p.w.kind);
  const i64 stretches = ceil_div(x.blocks, 4);
  const i64 part = M > 2 && std::is_same_v<Dot, NibblesByFloats> ? 4 : stretches;
  for (i64 s = 0; s < stretches; s += part) {
    alignas(64) float sums[M * kThinRows];
    each_row<M, M == 1 ? 4 : 1>(count, sums, [&](i64 r, auto n, float* rows) INLINE_LAMBDA {
      thin_nibbles<M, decltype(n)::value>(p.w, dot, from + r, x, s, least(stretches, s + part),
                                          rows);
    });
    for (i64 m = 0; m < M; ++m)
      for (i64 r = 0; r < count; ++r)
        out[m * kThinRows + r] = (s ? out[m * kThinRows + r] : 0.0f) + sums[m * kThinRows + r];
  }
}
template <int M, int D>
APART void dealt_bytes(const Product& p, const Dealt& x, i64 from, i64 count, float* out) {
  each_row<M, 1>(count, out, [&](i64 r, auto, float* sums) INLINE_LAMBDA {
    thin_bytes_by_digits<M, D>(p.w, from + r, x, sums);
  });
}
template <int M>
APART void code_rows(const Product& p, const ThinCodes& x, i64 from, i64 count, float* out) {
  each_row<M, M == 1 ? 4 : 1>(count, out, [&](i64 r, auto n, float* sums) INLINE_LAMBDA {
    thin_bytes<M, decltype(n)::value>(p.w, from + r, x, sums);
  });
}
#endif

// Rows [from, from + count) of the weight: out [M][kThinRows].
template <int M, class T>
APART void thin_rows(const Product& p, const Thin& x, i64 from, i64 count, float* out) {
#if defined(FASTLLM_BYTE_DOTS)
  constexpr int D = digits_of<T>();
  if (x.dealt.values) {
    if (p.w.kind == kInt8) return dealt_bytes<M, D>(p, x.dealt, from, count, out);
    if (!x.dealt.sums) return dealt_rows<M, NibblesByFloats>(p, x.dealt, from, count, out);
    if (p.activations == kFloat)
      return dealt_rows<M, NibblesByDigits<D>>(p, x.dealt, from, count, out);
    return dealt_rows<M, NibblesByDigits<1>>(p, x.dealt, from, count, out);
  }
  if (p.w.kind == kInt8 && p.activations != kFloat && !p.w.group && p.w.k <= kLongestInt32)
    return code_rows<M>(p, x.codes, from, count, out);
#endif
  with_kind(p.w.kind, [&](auto kind) {
    each_row<M, 1>(count, out, [&](i64 r, auto, float* sums) INLINE_LAMBDA {
      thin_row<M, decltype(kind)>(p, x, from + r, sums);
    });
  });
}

template <class T>
INLINE void finish_thin(const Product& p, const float* sums, i64 from, i64 count) {
  for (i64 m = 0; m < p.m; ++m)
    for (i64 j = 0; j < count; j += W) {
      const int n = int(least(W, count - j));
      Vec v = load(sums + m * kThinRows + j);
      if (p.bias) v = v + load((const T*)p.bias + from + j, n);
      if (p.activation) v = activate<false>(p.activation, v).value;
      store((T*)p.out + m * p.w.n + from + j, v, n);
    }
}

// A token as fp32, zeros behind it.
template <class T>
APART void widen_token(const T* x, i64 k, i64 width, float* out) {
  i64 i = 0;
  for (; i + W <= k; i += W) store(out + i, load(x + i));
  if (i < k) store(out + i, load(x + i, int(k - i)));
  for (i = ceil_div(k, W) * W; i < width; i += W) store(out + i, zero());
}

#if defined(FASTLLM_BYTE_DOTS)
// One token of blocks, as D digits of its floats or (D = 1) as the codes that it has.
template <int D>
APART void deal_token(const float* x, const int8_t* codes, i64 blocks, bool nibbles, int8_t* out,
                      int32_t* sums, float* units) {
  for (i64 b = 0; b < blocks; ++b, out += D * kDealt) {
    if constexpr (D == 1)
      deal_bytes(codes + b * kDealt, nibbles, out);
    else
      units[b] = deal_digits<D>(x + b * kDealt, nibbles, out);
    sum_digits<D>(out, nibbles ? 8 : 128, sums + b * (D == 4 ? 2 : 1) * W);
  }
}

// Room for dealt tokens, in floats: digits or floats, sums, units and groups of a block.
constexpr i64 kDealtRoom = kDealt + 2 * W + 1 + W;

// The tokens of a product, dealt out into `room`.
template <class T>
APART Dealt deal_tokens(const Product& p, const Thin& x, const Lanes& lanes, float* room) {
  const i64 width = x.codes.width, blocks = width / kDealt, all = p.m * blocks;
  const bool codes = p.activations != kFloat, nibbles = two_a_byte(p.w.kind);
  constexpr int D = digits_of<T>(), kHalves = D == 4 ? 2 : 1;
  int32_t* sums = (int32_t*)(room + all * kDealt);
  float *held = room + all * (kDealt + 2 * W), *units = held + all * W;
  bool plain = true, digits = codes || p.w.kind == kInt4 || p.w.kind == kInt8;
  for (i64 m = 0; m < p.m && !codes; ++m) {
    const float* token = x.values + m * width;
    plain = plain && largest(token, width) < 0x1p100f;  // NaN and infinity are not
    digits = digits && plain && (D < 4 || std::is_same_v<T, f16> || balanced(token, blocks));
  }
  if ((!plain && p.w.zeros) || (!digits && !nibbles)) return {};
  for (i64 m = 0; m < p.m; ++m) {
    const float* token = x.values + m * width;
    const i64 at = m * blocks;
    if (codes)
      deal_token<1>(nullptr, x.codes.codes + m * width, blocks, nibbles,
                    (int8_t*)room + at * kDealt, sums + at * W, nullptr);
    else if (digits)
      deal_token<D>(token, nullptr, blocks, nibbles, (int8_t*)room + at * D * kDealt,
                    sums + at * kHalves * W, units + at);
    else
      deal_floats(token, blocks, room + at * kDealt);
    float* groups = held + m * ceil_div(blocks, 4) * W;
    if (p.w.zeros && codes) hold_groups(x.codes.codes + m * width, blocks, lanes, groups);
    if (p.w.zeros && !codes) hold_groups(token, blocks, lanes, groups);
  }
  return {&lanes, room, digits ? sums : nullptr, units, held, x.codes.scales, blocks};
}
#endif

template <class T>
APART void thin(const Product& p, int threads) {
  const i64 width = ceil_div(p.w.k, 128) * 128;
  const i64 group = p.w.group ? p.w.group : least(p.w.k, kLongestInt32);
  const i64 groups = ceil_div(p.w.k, group);
  const bool integers = p.activations != kFloat;
  // values or codes, sums of groups, scales; and what is dealt out
#if defined(FASTLLM_BYTE_DOTS)
  const i64 dealt = p.m * (width / kDealt) * kDealtRoom;
#else
  const i64 dealt = 0;
#endif
  const Scratch scratch(p.m * (width + groups + 1) + dealt + 64);
  float *x = scratch.data(), *scales = x + ceil_div(p.m * width, 16) * 16;
  int32_t* sums = (int32_t*)(scales + p.m);
  int8_t* codes = (int8_t*)x;
  for (i64 m = 0; m < p.m; ++m) {
    const T* from = (const T*)p.x + m * p.x_row;
    scales[m] = 1.0f;
    if (!integers) {
      widen_token(from, p.w.k, width, x + m * width);
      continue;
    }
    const float* given = p.activations == kStatic ? &p.act_scale : nullptr;
    scales[m] = quantize_token(from, p.w.k, width, given, codes + m * width);
    for (i64 g = 0; g < groups; ++g) {
      int32_t sum = 0;
      for (i64 i = g * group; i < least(p.w.k, (g + 1) * group); ++i) sum += codes[m * width + i];
      sums[m * groups + g] = sum;
    }
  }
  Thin tokens{};
  tokens.values = x;
  tokens.codes = {codes, width, sums, group, scales};
#if defined(FASTLLM_BYTE_DOTS)
  const Lanes lanes(p.w);
  if (dealable(p.w) || (p.w.kind == kInt8 && !p.w.group && !integers))
    tokens.dealt = deal_tokens<T>(p, tokens, lanes, scales + ceil_div(p.m * (groups + 1), 16) * 16);
#endif
  parallel_for(ceil_div(p.w.n, kThinRows), threads, [&](i64 task) {
    const i64 from = task * kThinRows, count = least(kThinRows, p.w.n - from);
    alignas(64) float out[kThinTokens * kThinRows] = {};
    if (p.m == 1) thin_rows<1, T>(p, tokens, from, count, out);
    if (p.m == 2) thin_rows<2, T>(p, tokens, from, count, out);
    if (p.m == 3) thin_rows<3, T>(p, tokens, from, count, out);
    if (p.m == 4) thin_rows<4, T>(p, tokens, from, count, out);
    finish_thin<T>(p, out, from, count);
  });
}

// Whether some more tokens are best taken kThinTokens at a time: float32 by nf4 and fp4.
constexpr i64 kPartTokens = 12;
template <class T>
INLINE bool thin_parts_pay([[maybe_unused]] const Product& p) {
#if defined(FASTLLM_BYTE_DOTS)
  return std::is_same_v<T, float> && (p.w.kind == kNf4 || p.w.kind == kFp4) && dealable(p.w);
#else
  return false;
#endif
}
