// Many tokens: a block of the weight is decoded once into a cache and meets panel after panel.

constexpr i64 kBlockWords = 1024;      // of a row, decoded at a time
constexpr i64 kPackedBytes = 16 << 20;  // of activations at a time
constexpr i64 kSums = 1 << 17;          // kept by a task while it goes along k
constexpr i64 kLongestInt32 = 131072;   // terms of 127 * 127 that int32 holds

INLINE i64 common_divisor(i64 a, i64 b) { return b ? common_divisor(b, a % b) : a; }

// Whether a weight's numbers, but for one scale a row, are bf16.
INLINE bool bare(const Weight& w) { return !w.group && !two_a_byte(w.kind); }
// How many bf16 they are the sum of otherwise: four bits times a bf16 are two.
INLINE int weight_terms(const Weight& w, int most) {
  if (bare(w)) return 1;
  const bool two = w.kind == kInt4 && !w.zeros && w.scale_type == kScaleBFloat16;
  return two && most > 2 ? 2 : most;
}

// How a product is cut.
template <class E>
struct Plan {
  static constexpr i64 kPer = 4 / i64(sizeof(typename E::Word));
  i64 words;          // of a row, a multiple of 16
  i64 block;          // words decoded at a time
  i64 deep;           // words multiplied at a time, in one group
  int cols;           // of a panel
  i64 chunk, tokens;  // packed at a time; a task
  i64 rows;           // of the weight, a task
  bool grouped;       // sums of int32 become fp32 after each stretch
  bool dealt;         // words in the order of decode_dealt
  int terms;          // bf16 that a number of the weight is the sum of
  bool kept;          // sums, from one decoded block to the next
  Plan(const Product& p, int threads) {
    dealt = false;
#if defined(FASTLLM_BYTE_DOTS)
    dealt = std::is_same_v<typename E::Word, bf16> && dealable(p.w);
#endif
    const i64 unit = dealt ? 2 * kUnit : kUnit;
    words = ceil_div(p.w.k, unit) * unit / kPer;
    block = least(words, kBlockWords);
    grouped = E::kInteger && (p.w.group || two_a_byte(p.w.kind) || p.w.k > kLongestInt32);
    deep = grouped && p.w.group ? common_divisor(p.w.group / kPer, E::kDeep) : E::kDeep;
    cols = p.m <= W ? W : kMostVectors * W;
    const i64 panels = ceil_div(p.m, cols);
    const i64 panel = words * cols * E::kTerms;
    chunk = least(panels, most(8, kPackedBytes / most(1, panel * 4))) * cols;
    terms = E::kTerms > 1 ? weight_terms(p.w, E::kTerms) : 1;
    kept = block < words || terms > 1;
    tokens = kept ? least(chunk, kSums / (E::kBlockRows * cols) * cols) : chunk;
    rows = E::kBlockRows;
    const i64 step = most(E::kRows, W), across = ceil_div(least(chunk, p.m), tokens);
    while (rows > step && ceil_div(p.w.n, rows) * across < 3 * threads)
      rows = ceil_div(rows / 2, step) * step;
  }
  INLINE_MEMBER i64 stretches() const { return ceil_div(block, deep); }
  INLINE_MEMBER i64 sums() const { return rows * (kept ? tokens : cols); }
  // Floats that a thread needs: a block of the weight, three numbers a stretch and row, sums
  INLINE_MEMBER i64 room() const { return rows * (block + 3 * stretches()) + sums() + 64; }
};

template <class E, class T>
struct Blocks {
  const Product& p;
  const Plan<E> plan;
  float *packed, *scales, *totals;  // panels, a scale a token, sums of codes a stretch and token

  // ---- activations

  INLINE_MEMBER i64 all_stretches() const { return ceil_div(plan.words, plan.deep); }

  INLINE_MEMBER float* panel_at(i64 panel) const {
    return packed + panel * plan.cols * plan.words * E::kTerms;
  }

  // Panel `panel` of the tokens from `first` on: [kTerms][words][cols].
  INLINE_MEMBER void pack(i64 first, i64 panel) const {
    const i64 from = first + panel * plan.cols;
    float* out = panel_at(panel);
    if constexpr (E::kInteger) {
      pack_codes<T>(p, from, plan.cols, plan.words, sizeof(typename E::Word) == 1, E::kFlip, out,
                    scales + panel * plan.cols,
                    totals ? totals + panel * plan.cols * all_stretches() : nullptr, plan.deep);
    } else {
      const T* x = (const T*)p.x + from * p.x_row;
      const i64 rows = least(plan.cols, p.m - from);
      if constexpr (sizeof(typename E::Word) == 4) {
        pack_panel<Single<T>>(x, p.x_row, 1, rows, p.w.k, p.w.k, plan.cols, out);
        clear_behind(out, p.w.k);
      }
#if defined(FASTLLM_DOTS)
      else if (p.activations != kFloat) {
        const Scratch scratch(rows * plan.words + plan.words / 2);
        bf16* whole = (bf16*)scratch.data();
        int8_t* codes = (int8_t*)(scratch.data() + rows * plan.words);
        const float* given = p.activations == kStatic ? &p.act_scale : nullptr;
        for (i64 j = 0; j < rows; ++j) {
          scales[panel * plan.cols + j] =
              quantize_token(x + j * p.x_row, p.w.k, 2 * plan.words, given, codes);
          for (i64 i = 0; i < 2 * plan.words; i += W)
            store(whole + j * 2 * plan.words + i, to_float(bytes_as_words(codes + i)));
        }
        pack_pairs(whole, 2 * plan.words, rows, out);
      } else if constexpr (E::kTerms == 1) {
        pack_pairs(x, p.x_row, rows, out);
      } else {
        const Scratch scratch(rows * plan.words);
        bf16* term = (bf16*)scratch.data();
        for (int t = 0; t < E::kTerms; ++t) {
          for (i64 j = 0; j < rows; ++j)
            term_of(x + j * p.x_row, p.w.k, t, term + j * 2 * plan.words);
          pack_pairs(term, 2 * plan.words, rows, out + t * plan.cols * plan.words);
        }
      }
#endif
    }
  }
  INLINE_MEMBER void clear_behind(float* panel, i64 words) const {
    __builtin_memset(panel + words * plan.cols, 0, 4 * (plan.words - words) * plan.cols);
  }
#if defined(FASTLLM_DOTS)
  INLINE_MEMBER void pack_pairs(const bf16* x, i64 row, i64 rows, float* out) const {
    if (plan.dealt) return pack_dealt(x, row, rows, p.w.k, plan.words, plan.cols, out);
    const i64 words = ceil_div(p.w.k, 2);
    pack_panel<Pair>(x, row, 1, rows, p.w.k, words, plan.cols, out);
    clear_behind(out, words);
  }
#endif

  // ---- the weight

  // Rows [from, from + count) of the weight, words [at, at + words), as tiles; zeros behind them.
  // term: which one of plan.terms.
  INLINE_MEMBER void decode(i64 from, i64 count, i64 at, i64 words, int term,
                            float* weight) const {
    using Word = typename E::Word;
    constexpr i64 kPer = Plan<E>::kPer;
#if defined(FASTLLM_BYTE_DOTS)
    const Lanes lanes(p.w);
#endif
    for (i64 r = 0; r < plan.rows; ++r) {
      float* out = weight + r / E::kRows * E::kRows * words + E::row(r % E::kRows, words);
      if (r >= count || p.w.k < (at + words) * kPer)
        for (i64 i = 0; i < words; i += 16) __builtin_memset(out + i / 16 * E::kStep, 0, 64);
      if (r >= count) continue;
      const uintptr_t ahead = uintptr_t(p.w.codes) + (from + r + 2) * p.w.row;
      const i64 first = code_bytes(p.w.kind, at * kPer), size = code_bytes(p.w.kind, words * kPer);
      for (i64 i = 0; i < size; i += 64) __builtin_prefetch((const void*)(ahead + first + i));
#if defined(FASTLLM_BYTE_DOTS)
      if (plan.dealt) {
        decode_dealt(p.w, lanes, from + r, at * kPer, words, term, out, E::kStep);
        continue;
      }
#endif
      with_kind(p.w.kind, [&](auto kind) INLINE_LAMBDA {
        using C = decltype(kind);
        if constexpr (E::kInteger)
          decode_integers<Word, C>(p.w, from + r, at * kPer, words, out, E::kStep);
        else
          decode_floats<Word, C>(p.w, from + r, at * kPer, words, term, out, E::kStep);
      });
    }
  }

  // What the sums of each stretch are worth: [stretches][rows] each.
  INLINE_MEMBER void weigh(i64 from, i64 count, i64 at, i64 words,
                           [[maybe_unused]] const float* weight, float* numbers) const {
    const i64 size = plan.stretches() * plan.rows;
    int32_t* starts = (int32_t*)numbers;
    float *scale = numbers + size, *shift = scale + size;
    for (i64 s = 0; s * plan.deep < words; ++s)
      for (i64 r = 0; r < plan.rows; ++r) {
        const i64 here = s * plan.rows + r, word = s * plan.deep;
        starts[here] = 0;
#if defined(FASTLLM_BYTE_DOTS)
        if (E::kFlip) starts[here] = -128 * byte_sum(weight + r * words + word,
                                                     least(plan.deep, words - word));
#endif
        const i64 k = (at + word) * Plan<E>::kPer;
        scale[here] = shift[here] = 0.0f;
        if (!plan.grouped || r >= count || k >= p.w.k) continue;
        const i64 index = scale_index(p.w, from + r, k);
        scale[here] = scale_at(p.w.scales, p.w.scale_type, index);
        if (p.w.zeros) shift[here] = (8.0f - zero_at(p.w, index)) * scale[here];
      }
  }

  // ---- results

  // Rows [from, from + count) of the weight by the tokens of a panel: sums [rows][cols].
  __attribute__((noinline)) void finish(const float* sums, i64 from, i64 count, i64 token,
                                        const float* token_scales) const {
    const bool in_code = plan.grouped || p.w.group || two_a_byte(p.w.kind);
    for (i64 n = 0; n < count; n += W) {
      const int lanes = int(least(W, count - n));
      Vec scale = set1(1.0f), bias = zero();
      if (!in_code) {
        alignas(64) float each[W] = {};
        for (int i = 0; i < lanes; ++i)
          each[i] = scale_at(p.w.scales, p.w.scale_type, scale_index(p.w, from + n + i, 0));
        scale = load(each);
      }
      if (p.bias) bias = load((const T*)p.bias + from + n, lanes);
      for (i64 j = 0; j < plan.cols && token + j < p.m; j += W) {
        Vec block[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          block[i] = load(sums + (n + i) * plan.cols + j);
          if (E::kInteger && !plan.grouped) block[i] = to_float(bits_of(block[i]));
        }
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          if (token + j + i >= p.m) break;
          Vec v = block[i] * scale;
          if (p.activations != kFloat) v = v * set1(token_scales[j + i]);
          if (p.bias) v = v + bias;
          if (p.activation) v = activate<false>(p.activation, v).value;
          T* to = (T*)p.out + (token + j + i) * p.w.n + from + n;
          if (lanes == W)
            put_quick<false>(to, v, All{});
          else
            store(to, v, lanes);
        }
      }
    }
  }

  // ---- a task: rows [from, from + plan.rows) by tokens [begin, end) of those packed from `first`

  __attribute__((noinline)) void task(i64 from, i64 first, i64 begin, i64 end, float* room) const {
    [[maybe_unused]] const typename E::Session session;
    const i64 count = least(plan.rows, p.w.n - from), size = plan.stretches() * plan.rows;
    float *weight = room, *numbers = weight + plan.rows * plan.block, *sums = numbers + 3 * size;
    for (i64 at = 0; at < plan.words; at += plan.block) {
      const i64 words = least(plan.block, plan.words - at);
      for (int term = 0; term < plan.terms; ++term) {
        const bool last = at + words == plan.words && term + 1 == plan.terms;
        decode(from, count, at, words, term, weight);
        if (E::kInteger) weigh(from, count, at, words, weight, numbers);
        for (i64 token = begin; token < end; token += plan.cols) {
          const i64 panel = token / plan.cols;
          float* c = sums + (plan.kept ? (token - begin) * plan.rows : 0);
          for (int t = E::kTerms - 1 - term; t >= 0; --t)  // the smallest first
            meet(weight, numbers, count, panel, t, at, words,
                 at > 0 || term > 0 || t < E::kTerms - 1, c);
          if (last) finish(c, from, count, first + token, scales + panel * plan.cols);
        }
      }
    }
  }

  // c (+)= a decoded block times term t of a panel.
  INLINE_MEMBER void meet(const float* weight, const float* numbers, i64 count, i64 panel, int t,
                          i64 at, i64 words, bool add, float* c) const {
    const float* x = panel_at(panel) + (t * plan.words + at) * plan.cols;
    const i64 size = plan.stretches() * plan.rows;
    for (i64 s = 0; s * plan.deep < words; ++s) {
      const i64 word = s * plan.deep, deep = least(plan.deep, words - word);
      const float* total =
          totals ? totals + (panel * all_stretches() + at / plan.deep + s) * plan.cols : nullptr;
      for (i64 r = 0; r < plan.rows; r += E::kRows) {
        if (r >= count) break;
        const float* scale = numbers + size + s * plan.rows + r;
        E::multiply(deep, weight + r * words, words, word, x, plan.cols,
                    {(const int32_t*)numbers + s * plan.rows + r, plan.grouped ? scale : nullptr,
                     p.w.zeros ? scale + size : nullptr, total},
                    c + r * plan.cols, add || word > 0);
      }
    }
  }

  void run(int threads) {
    for (i64 first = 0; first < p.m; first += plan.chunk) {
      const i64 tokens = least(plan.chunk, p.m - first), panels = ceil_div(tokens, plan.cols);
      parallel_for(panels, useful_threads(tokens * p.w.k * i64(sizeof(T)), threads),
                   [&](i64 panel) { pack(first, panel); });
      const i64 down = ceil_div(p.w.n, plan.rows), across = ceil_div(tokens, plan.tokens);
      i64 next = 0;
      const Scratch scratch(plan.room() * threads);
      parallel_for(threads, threads, [&](i64 thread) {
        float* room = scratch.data() + plan.room() * thread;
        for (;;) {
          const i64 i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
          if (i >= down * across) return;
          const i64 begin = i / down * plan.tokens;
          task(i % down * plan.rows, first, begin, least(tokens, begin + plan.tokens), room);
        }
      });
    }
  }
};

template <class E, class T>
APART void run_blocks(const Product& p, int threads) {
  const Plan<E> plan(p, threads);
  const i64 chunk = ceil_div(least(plan.chunk, p.m), plan.cols) * plan.cols;
  const i64 stretches = E::kInteger && p.w.zeros ? ceil_div(plan.words, plan.deep) : 0;
  const Scratch scratch(chunk * (plan.words * E::kTerms + 1 + stretches) + 64);
  float *packed = scratch.data(), *scales = packed + chunk * plan.words * E::kTerms;
  float* totals = scales + chunk;
  Blocks<E, T>{p, plan, packed, scales, stretches ? totals : nullptr}.run(threads);
}

#if defined(FASTLLM_TILES)
#include "cpu/kernels/qgemm_many.inl"
#endif

template <class T>
void blocks(const Product& p, int threads) {
  if (p.activations != kFloat) {
#if defined(FASTLLM_TILES)
    if (many(p)) return run_many<T>(p, threads);
    if (!p.w.group && p.w.kind == kInt8 && p.w.k <= kLongestInt32)
      return run_blocks<ByteTiles, T>(p, threads);
    if constexpr (std::is_same_v<T, bf16>)  // int8 are bf16, too
      if (p.w.kind == kInt4) return run_blocks<Floats16, T>(p, threads);
#endif
    return run_blocks<Integers, T>(p, threads);
  }
#if defined(FASTLLM_TILES)
  if constexpr (std::is_same_v<T, f16>) return run_blocks<TermTiles<2>, T>(p, threads);
  if constexpr (std::is_same_v<T, float>)  // six products would not beat plain ones
    if (weight_terms(p.w, 3) < 3) return run_blocks<TermTiles<3>, T>(p, threads);
#endif
  if constexpr (std::is_same_v<T, bf16>)
    run_blocks<Floats16, T>(p, threads);
  else
    run_blocks<Floats32, T>(p, threads);
}
