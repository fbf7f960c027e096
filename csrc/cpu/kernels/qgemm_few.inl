// Some tokens by nibbles in groups, in tiles. What a nibble stands for is a bf16 (int4) or the sum
// of a few (nf4, fp4), so that codes are looked up and no more is done to them; a group's scale
// meets the group's sums. Numbers of tokens are sums of bf16, too: `terms` of them. Terms of few
// tokens lie side by side in one tile of columns, those of more meet a tile of codes in turn.
//
// Bytes with a scale a row meet digits of 8 bits: the numbers of a token's block are integers, in
// units of a part of its largest one, and their digits lie side by side.

template <class T>
struct Few {
  const Product& p;
  const Lanes lanes;
  const int terms;
  const bool aside;  // terms are columns
  const i64 deep, blocks, folds;  // numbers of a block; blocks of a row; folds of a block
  const i64 per, across;          // tokens of a tile of columns, and how many of these there are
  float *packed, *held;  // [across][blocks][kSteps][terms] tiles; [across][blocks][folds][16]: the
                         // sums of nibbles' folds, the units of digits
  const int8_t* codes;   // of rounded activations, [m][128 blocks], and a scale a token
  const float* scales;
  i64 first, tokens;     // those of the product that are packed

  INLINE_MEMBER i64 tile_terms() const { return aside ? 1 : terms; }
  INLINE_MEMBER i64 block_words() const { return kSteps * tile_terms() * kTileWords; }
  INLINE_MEMBER float* tiles_at(i64 at) const { return packed + at * block_words(); }

  // ---- tokens

  // The term of column i of a tile, or -1, and its token.
  INLINE_MEMBER int term_at(i64 tile, i64 i) const {
    const i64 term = i / per;
    return tile * per + i % per < tokens && term < (aside ? terms : 1) ? int(term) : -1;
  }
  INLINE_MEMBER i64 token_at(i64 tile, i64 i) const { return first + tile * per + i % per; }

  template <class X>
  INLINE_MEMBER void pack_pairs(const X* x, i64 row, i64 tile, i64 block) const {
    float* out = tiles_at(tile * blocks + block);
    for (i64 s = 0; s < kSteps; ++s)
      for (int t = 0; t < tile_terms(); ++t, out += kTileWords) {
        const i64 at = block * deep + s * 32;
        Vec columns[W];
        for (int i = 0; i < W; ++i) {
          const int term = term_at(tile, i);
          columns[i] = term < 0 ? zero()
                                : pairs_of(x + token_at(tile, i) * row + at, p.w.k - at,
                                           aside ? term : t, terms);
        }
        transpose(columns);
        for (int i = 0; i < W; ++i) store(out + i * W, columns[i]);
      }
    if (!held) return;
    const i64 wide = deep / folds;  // the sums of folds; of terms side by side the first has all
    for (i64 f = 0; f < folds; ++f)
      for (i64 i = 0; i < W; ++i) {
        const i64 at = block * deep + f * wide;
        Vec sum = zero();
        if (term_at(tile, i) == 0)
          for (i64 k = at; k < at + wide; k += W)
            sum = sum + numbers_at(x + token_at(tile, i) * row + k, p.w.k - k);
        held[((tile * blocks + block) * folds + f) * W + i] = hsum(sum);
      }
  }

  INLINE_MEMBER void pack_digits(i64 tile, i64 block) const {
    alignas(64) int8_t digits[W][kByteBlock] = {};
    float* units = held + (tile * blocks + block) * W;
    const i64 at = block * deep, n = least(deep, p.w.k - at);
    for (int i = 0; i < W; ++i) units[i] = 0.0f;
    for (i64 i = 0; i < per && term_at(tile, i) == 0; ++i) {
      const T* x = (const T*)p.x + token_at(tile, i) * p.x_row + at;
      const float top = largest(x, n);
      if (top == 0.0f) continue;
      const float most_units = __builtin_ldexpf(127.0f, 8 * (terms - 1)), by = most_units / top;
      for (int d = 0; d < terms; ++d)
        units[d * per + i] = __builtin_ldexpf(1.0f / by, 8 * (terms - 1 - d));
      for (i64 k = 0; k < n; k += W) {
        IntVec v = nearest(numbers_at(x + k, n - k) * set1(by));
        for (int d = terms - 1; d >= 0; --d) {
          const IntVec low = d ? ((v + 128) & 255) - 128 : v;
          store_bytes((uint8_t*)digits[d * per + i] + k, (decltype(load_bytes(nullptr)))low);
          v = (v - low) >> 8;
        }
      }
    }
    float* out = tiles_at(tile * blocks + block);
    for (i64 s = 0; s < kSteps; ++s, out += kTileWords) {
      Vec columns[W];
      for (int i = 0; i < W; ++i) columns[i] = from_bits(load_words(digits[i] + 64 * s));
      transpose(columns);
      for (int i = 0; i < W; ++i) store(out + i * W, columns[i]);
    }
  }

  INLINE_MEMBER void pack(i64 tile, i64 block) const {
    if (p.w.kind == kInt8)
      pack_digits(tile, block);
    else if (codes)
      pack_pairs(codes, blocks * deep, tile, block);
    else
      pack_pairs((const T*)p.x, p.x_row, tile, block);
  }

  // ---- a task: rows [from, from + count) by all that is packed

  // Block b of the rows as tiles, [4][kSteps][P].
  template <int P>
  INLINE_MEMBER void decode(const Planes<P>& look, i64 from, i64 count, i64 b, float* a) const {
    constexpr i64 kBlock = P ? 64 : kByteBlock, kPlanes = P ? P : 1;
    const i64 left = code_bytes(p.w.kind, p.w.k) - b * kBlock, step = p.w.row;
    const i64 ahead = b + 8 < blocks ? 8 * kBlock : kFewRows * step + (8 - blocks) * kBlock;
    const uint8_t* row = p.w.codes + from * step + b * kBlock;
    const auto rows = [&](const auto& put) INLINE_LAMBDA {
      for (i64 r = 0; r < count; ++r, row += step) {
        const uintptr_t next = uintptr_t(row) + ahead;
#pragma GCC unroll 4
        for (i64 i = 0; i < kBlock; i += 64) __builtin_prefetch((const void*)(next + i), 0, 2);
        put(row, a + r / W * (kSteps * kPlanes * kTileWords) + r % W * W);
      }
    };
    const auto put = [&](const uint8_t* codes, float* to) INLINE_LAMBDA {
      if constexpr (P)
        look.decode(codes, to);
      else
#pragma GCC unroll 4
        for (i64 s = 0; s < kSteps; ++s)
          store_words(to + s * kTileWords, load_words(codes + 64 * s));
    };
    if (left >= kBlock) return rows(put);
    rows([&](const uint8_t* codes, float* to) INLINE_LAMBDA {
      alignas(64) uint8_t rest[kBlock] = {};
      __builtin_memcpy(rest, codes, left);
      put(rest, to);
    });
  }

  // room: tiles of codes, sums of folds, scales and shifts of a stretch, sums.
  template <int P, int N, int F>
  __attribute__((noinline)) void task(const Planes<P>& look, i64 from, i64 count,
                                      float* room) const {
    float *a = room, *c = a + 4 * kSteps * (P ? P : 1) * kTileWords;
    float *worth = c + kSteps * 4 * kTileWords, *shift = worth + kFewRows * W;
    float* sums = shift + kFewRows * W;
    for (i64 b = 0; b < blocks; ++b) {
      if (P && b % 4 == 0) weigh(from, count, b / 4, worth, shift);
      decode<P>(look, from, count, b, a);
      for (i64 tile = 0; tile < across; ++tile) {
        const i64 at = tile * blocks + b;
        if constexpr (P)
          code_tiles<P, N>(F, a, tiles_at(at), c);
        else
          digit_tiles(a, tiles_at(at), c);
        float* to = sums + tile * kFewRows * W;
        if (!P)
          fold_digits(count, b, held + at * W, c, to);
        else if (held)
          fold<F, true>(count, b, worth, shift, held + at * F * W, c, to);
        else
          fold<F, false>(count, b, worth, shift, nullptr, c, to);
      }
    }
    for (i64 tile = 0; tile < across; ++tile) finish(sums + tile * kFewRows * W, from, count, tile);
  }

  // The scales of stretch s, and what a token's sum over each group is worth: [rows][16].
  INLINE_MEMBER void weigh(i64 from, i64 count, i64 s, float* worth, float* shift) const {
    for (i64 r = 0; r < count; ++r) {
      const i64 index = scale_index(p.w, from + r, 0);
      const Vec scale = lanes.of(p.w.scales, p.w.scale_type, index, s);
      store(worth + r * W, scale);
      if (p.w.zeros)
        store(shift + r * W,
              (set1(8.0f) - lanes.of(p.w.zeros, p.w.scale_type, index, s)) * scale);
    }
  }

  // sums (+)= the folds of block b times their groups' scales.
  template <int F, bool Shifted>
  INLINE_MEMBER void fold(i64 count, i64 b, const float* worth, const float* shift,
                          const float* totals, const float* c, float* sums) const {
    i64 group[F];
#pragma GCC unroll 4
    for (i64 f = 0; f < F; ++f) group[f] = (b % 4 * kDealt + f * (kDealt / F)) >> lanes.shift;
    for (i64 r = 0; r < count * W; r += W) {
      Vec v = b ? load(sums + r) : zero();
#pragma GCC unroll 4
      for (i64 f = 0; f < F; ++f) {
        if (Shifted) v = fma(set1(shift[r + group[f]]), load(totals + f * W), v);
        v = fma(set1(worth[r + group[f]]), load(c + f * 4 * kTileWords + r), v);
      }
      store(sums + r, v);
    }
  }
  INLINE_MEMBER void fold_digits(i64 count, i64 b, const float* units, const float* c,
                                 float* sums) const {
    const Vec unit = load(units);
    for (i64 r = 0; r < count * W; r += W) {
      const Vec v = to_float(load_words(c + r));
      store(sums + r, b ? fma(v, unit, load(sums + r)) : v * unit);
    }
  }

  __attribute__((noinline)) void finish(const float* sums, i64 from, i64 count, i64 tile) const {
    for (i64 n = 0; n < count; n += W) {
      const int rows = int(least(W, count - n));
      const Vec bias = p.bias ? load((const T*)p.bias + from + n, rows) : zero();
      Vec scale = set1(1.0f), columns[W];
      if (p.w.kind == kInt8) {
        alignas(64) float each[W] = {};
        for (int i = 0; i < rows; ++i)
          each[i] = scale_at(p.w.scales, p.w.scale_type, scale_index(p.w, from + n + i, 0));
        scale = load(each);
      }
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) columns[i] = load(sums + (n + i) * W);
      transpose(columns);
      for (i64 i = 0; i < per && term_at(tile, i) == 0; ++i) {
        const i64 token = token_at(tile, i);
        Vec v = columns[i];
        if (aside) {
          v = zero();  // the smallest first
          for (int t = terms - 1; t >= 0; --t) v = v + columns[t * per + i];
        }
        v = v * scale;
        if (codes) v = v * set1(scales[token]);
        if (p.bias) v = v + bias;
        if (p.activation) v = activate<false>(p.activation, v).value;
        store((T*)p.out + token * p.w.n + from + n, v, rows);
      }
    }
  }

  template <int P, int N, int F>
  __attribute__((noinline)) void run(int threads) const {
    parallel_for(across * blocks, useful_threads(tokens * p.w.k * 4, threads),
                 [&](i64 i) { pack(i / blocks, i % blocks); });
    const Planes<P> look(p.w.kind);
    const i64 room = kTileWords * 4 * kSteps * (most(P, 1) + 1) + kFewRows * W * (2 + across);
    const Scratch scratch(room * threads);
    i64 next = 0;
    parallel_for(threads, threads, [&](i64 thread) {
      const TileSession session;
      for (;;) {
        const i64 from = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) * kFewRows;
        if (from >= p.w.n) return;
        task<P, N, F>(look, from, least(kFewRows, p.w.n - from), scratch.data() + room * thread);
      }
    });
  }
  template <int P, int N>
  void run_folds(int threads) const {
    if (folds == 1) return run<P, N, 1>(threads);
    if (folds == 2) return run<P, N, 2>(threads);
    run<P, N, 4>(threads);
  }
};

// Whether this way is faster than the others, as measured with 1 and 4 threads.
template <class T>
INLINE bool few_pays(const Product& p) {
  constexpr bool kPairs = std::is_same_v<T, bf16>, kWide = std::is_same_v<T, float>;
  if (kPairs && p.m > kFewTokens) return false;
  if (p.w.kind == kInt8) return !p.w.group && p.activations == kFloat && p.m > 2;
  if (!dealable(p.w)) return false;
  if (p.w.kind == kInt4) return p.m > (p.activations != kFloat || kPairs ? 4 : 3);
  return !kWide && p.m > (kPairs ? 3 : 4);
}

// Takes a product this way, unless its tokens have numbers that this way does not hold.
template <class T>
APART bool few(const Product& p, int threads) {
  const bool bytes = p.w.kind == kInt8;
  const bool whole = p.activations != kFloat;
  const i64 deep = bytes ? kByteBlock : kDealt, blocks = ceil_div(p.w.k, deep);
  const i64 fold = p.w.group && !bytes ? least(p.w.group, deep) : deep, folds = deep / fold;
  const i64 chunk = least(kFewTokens, p.m);
  const i64 across = bytes ? chunk / 4 + 1 : ceil_div(chunk, W);  // at most
  constexpr int kTerms = std::is_same_v<T, bf16> ? 1 : std::is_same_v<T, f16> ? 2 : 3;
  const i64 tiles = across * blocks * kSteps * (bytes ? 1 : kTerms) * kTileWords;
  const i64 sums = bytes || p.w.zeros ? across * blocks * folds * W : 0;
  const Scratch scratch(tiles + sums + (whole ? p.m * (blocks * deep / 4 + 1) : 0) + 64);
  float *held = scratch.data() + tiles, *scales = held + sums;
  int8_t* codes = (int8_t*)(scales + p.m);
  int usual = 1, most_digits = 0;  // code times infinity would be NaN where the number is not 0
  parallel_for(p.m, useful_threads(p.m * p.w.k * 4, threads), [&](i64 m) {
    const T* x = (const T*)p.x + m * p.x_row;
    const float* given = p.activations == kStatic ? &p.act_scale : nullptr;
    const int digits = bytes ? digits_for(x, p.w.k) : 0;
    if (whole)
      scales[m] = quantize_token(x, p.w.k, blocks * deep, given, codes + m * blocks * deep);
    else if (bytes ? !digits : !(largest(x, p.w.k) < 0x1p100f))
      __atomic_store_n(&usual, 0, __ATOMIC_RELAXED);
    int before = __atomic_load_n(&most_digits, __ATOMIC_RELAXED);
    while (before < digits && !__atomic_compare_exchange_n(&most_digits, &before, digits, true,
                                                           __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  });
  if (!usual) return false;
  const int terms = bytes ? most_digits : whole ? 1 : kTerms;
  for (i64 first = 0; first < p.m; first += chunk) {
    const i64 tokens = least(chunk, p.m - first);
    const bool aside = bytes || (terms > 1 && tokens * terms <= (terms - 1) * W);
    const i64 per = aside ? W / terms : W;
    const Few<T> all{p, Lanes(p.w), terms, aside, deep, blocks, folds, per, ceil_div(tokens, per),
                     scratch.data(), bytes || p.w.zeros ? held : nullptr, whole ? codes : nullptr,
                     scales, first, tokens};
    if (bytes)
      all.template run<0, 1, 1>(threads);
    else if (p.w.kind == kInt4 && (aside || whole))
      all.template run_folds<1, 1>(threads);
    else if (p.w.kind == kInt4)
      all.template run_folds<1, kTerms>(threads);
    else if constexpr (kTerms < 3) {
      if (aside)
        all.template run_folds<kTerms, 1>(threads);
      else
        all.template run_folds<kTerms, kTerms>(threads);
    }
  }
  return true;
}
