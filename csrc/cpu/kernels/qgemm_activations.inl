// Activations as words: quantized to int8 a token at a time, or converted, then packed for a panel.

INLINE Vec divided(Vec a, Vec b) { return {a.v / b.v}; }

// The largest magnitude of n numbers; NaN if there is one.
template <class T>
INLINE float largest(const T* x, i64 n) {
  Vec top[4] = {zero(), zero(), zero(), zero()};
  sweep(n, [&](auto lanes, i64 i, int k) INLINE_LAMBDA {
    const IntVec bits = bits_of(get(x + i, lanes)) & 0x7fffffff, best = bits_of(top[k]);
    top[k] = from_bits(choose_bits(bits > best, bits, best));  // as integers NaN is above all
  });
  uint32_t most_bits = 0;
  for (const Vec& v : top) most_bits = top_bits(v) > most_bits ? top_bits(v) : most_bits;
  float value;
  __builtin_memcpy(&value, &most_bits, 4);
  return value;
}

// x / scale, rounded as a division is: a product with the inverse, mended.
struct Divider {
  float scale, inverse;
  bool exact;  // the inverse is a normal number
  explicit INLINE_MEMBER Divider(float s) : scale(s), inverse(1.0f / s) {
    exact = s > 0x1p-100f && s < 0x1p100f;
  }
  INLINE_MEMBER Vec operator()(Vec x) const {
    if (!exact) return divided(x, set1(scale));
    const Vec q = x * set1(inverse);
    return fma_once(fma_once(zero() - q, set1(scale), x), set1(inverse), q);
  }
};

// Codes of one token and its scale: 0 for a token of zeros, NaN for one that is not finite.
// Behind n up to `padded` lie zeros.
template <class T>
APART float quantize_token(const T* x, i64 n, i64 padded, const float* given, int8_t* codes) {
  const float top = largest(x, n), scale = given ? *given : top / 127.0f;
  const bool finite = top - top == 0.0f, usable = finite && scale > 0.0f;
  i64 i = 0;
  if (usable) {
    const Divider by(scale);
    const auto step = [&](auto lanes) INLINE_LAMBDA {
      const Vec q = by(get(x + i, lanes));
      const Vec bounded = at_most(at_least(q, set1(-127.0f)), set1(127.0f));
      store_bytes((uint8_t*)codes + i, (decltype(load_bytes(nullptr)))nearest(bounded));
    };
    for (; i + W <= n; i += W) step(All{});
    if (i < n) {
      step(First{int(n - i)});
      i = n;
    }
  }
  for (; i < padded; ++i) codes[i] = 0;
  return finite ? scale : top - top;  // of inf and NaN: NaN
}

// Tokens [from, from + cols) as a panel [words][cols] of integer words, and their scales; `words`
// is a multiple of 16, `flip` 128 where the dot product wants this side unsigned. Totals, unless
// null: [stretches][cols] sums of the codes of each `deep` words.
template <class T>
APART void pack_codes(const Product& p, i64 from, i64 cols, i64 words, bool bytes, uint8_t flip,
                      float* out, float* scales, float* totals, i64 deep) {
  const i64 per = bytes ? 4 : 2, padded = words * per, count = least(cols, p.m - from);
  const Scratch scratch(count * words + padded / 4);
  float* rows = scratch.data();
  int8_t* codes = (int8_t*)(rows + count * words);
  for (i64 j = 0; j < count; ++j) {
    const T* x = (const T*)p.x + (from + j) * p.x_row;
    const float* given = p.activations == kStatic ? &p.act_scale : nullptr;
    scales[j] = quantize_token(x, p.w.k, padded, given, codes);
    float* row = rows + j * words;
    if (bytes)
      for (i64 i = 0; i < padded; ++i) ((uint8_t*)row)[i] = uint8_t(uint8_t(codes[i]) ^ flip);
    else
      for (i64 i = 0; i < words; i += W) store_words(row + i, bytes_as_shorts(codes + 2 * i));
    for (i64 s = 0; totals && s * deep < words; ++s) {
      int32_t sum = 0;
      for (i64 i = s * deep * per; i < least(padded, (s + 1) * deep * per); ++i) sum += codes[i];
      totals[s * cols + j] = float(sum);
    }
  }
  pack_panel<Single<float>>(rows, words, 1, count, words, words, int(cols), out);
}
