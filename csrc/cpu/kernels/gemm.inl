// The driver: packs both sides into panels, cuts the result into blocks, deals blocks to threads.
#include "cpu/kernels/math.inl"

#include "cpu/kernels/gemm_pack.inl"

#include "cpu/kernels/gemm_micro.inl"

#include "cpu/kernels/gemm_epilogue.inl"

#include "cpu/kernels/gemm_thin.inl"

constexpr i64 kBlockRows = 128, kBlockCols = 128;  // of the result, at most, a task
constexpr i64 kLeftWords = 2 << 20, kRightWords = 3 << 19;  // of packed panels at a time
constexpr i64 kSplitWords = 4096;                           // of k, from which it may be split

// How a product is cut. Everything but the sizes of blocks follows from m, n, k alone.
template <class E>
struct Plan {
  i64 m, n, k, words;
  int height;                // rows of a left panel
  i64 left, right;           // panels of each side
  i64 left_chunk, right_chunk;  // panels packed at a time
  i64 slices;                // of k
  bool own;                  // each task packs the right panels that it alone needs
  i64 block;                 // rows of the result a task, at most
  i64 deep;                  // words of k summed before they join the total: few in small products
  Plan(const Product& p) {
    m = p.m, n = p.n, k = p.k;
    words = E::words(k);
    height = E::rows(m);
    left = ceil_div(m, height);
    right = ceil_div(n, E::kCols);
    block = p.block_rows ? least(p.block_rows, kBlockRows) : kBlockRows;
    own = left * height <= kBlockRows;
    deep = own && m * n <= (1 << 14) ? 32 : E::kWords;
    const i64 large = most(1, p.threads / 4);
    left_chunk = least(left, most(kBlockRows / height, large * kLeftWords / most(1, height * words)));
    right_chunk = least(right, most(4, large * kRightWords / most(1, E::kCols * words)));
    slices = left * right <= 64 ? most(1, least(16, words / (kSplitWords / 2))) : 1;
    if (words < kSplitWords) slices = 1;
  }
};

// Rows and columns of a block, in panels: large enough to reuse, small enough for every thread.
struct Cut {
  i64 rows, cols;
  Cut(i64 left, i64 right, i64 height, i64 width, i64 block, int threads) {
    rows = least(left, most(1, block / height));
    cols = least(right, kBlockCols / width);
    while (tasks(left, right) < 4 * threads && (rows > 1 || cols > 1)) {
      if (rows * height >= cols * width && rows > 1)
        rows = ceil_div(rows, 2);
      else
        cols = cols > 1 ? ceil_div(cols, 2) : (rows = ceil_div(rows, 2), 1);
    }
  }
  INLINE_MEMBER i64 tasks(i64 left, i64 right) const {
    return ceil_div(left, rows) * ceil_div(right, cols);
  }
};

// Sums of rows x cols panels over words [from, to), into [cols][rows][height][kCols].
template <class E>
INLINE void sums_of(const float* a, i64 a_words, const float* b, i64 b_words, i64 b_from, i64 rows,
                    i64 cols, int height, i64 step, i64 from, i64 to, bool fresh, float* c) {
  for (i64 w = from; w < to; w += step) {
    const i64 deep = least(step, to - w);
    for (i64 j = 0; j < cols; ++j)
      for (i64 i = 0; i < rows; ++i)
        E::micro(height, deep, a + (i * a_words + w) * height,
                 b + (j * b_words + w - b_from) * E::kCols, c + (j * rows + i) * height * E::kCols,
                 !fresh || w > from);
  }
  if (from == to && fresh)
    for (i64 i = 0; i < rows * cols * height * E::kCols; i += W) store(c + i, zero());
}

template <class E>
INLINE void finish_block(const Product& p, i64 batch, const float* c, const float* c2, i64 row,
                         i64 rows, i64 col, i64 cols, int height) {
  for (i64 j = 0; j < cols; ++j) {
    const i64 from = j * rows * height * E::kCols, at = col + j * E::kCols;
    finish<typename E::T>(p, batch, c + from, c2 ? c2 + from : nullptr, row,
                          least(rows * height, p.m - row), at, least(E::kCols, p.n - at),
                          E::kCols);
  }
}

template <class E>
INLINE void pack_left(const Product& p, i64 batch, const Plan<E>& plan, i64 panel, float* out) {
  using T = typename E::T;
  const T* src = (const T*)p.a.data + batch * p.a.batch + panel * plan.height * p.a.row;
  E::pack_left(src, p.a.row, p.a.col, least(plan.height, p.m - panel * plan.height), p.k,
               plan.words, plan.height, out);
}

// Words [w, w + words) of one right panel.
template <class E>
INLINE void pack_right(const Matrix& b, i64 batch, i64 n, i64 k, i64 panel, i64 w, i64 words,
                       float* out) {
  using T = typename E::T;
  const i64 first = w * E::kGroup;
  const T* src = (const T*)b.data + batch * b.batch + panel * E::kCols * b.row + first * b.col;
  E::pack_right(src, b.row, b.col, least(E::kCols, n - panel * E::kCols), k - first, words, out);
}

// Few rows: every task packs its own right panels, a piece of k at a time, and nobody waits.
template <class E>
APART void own_task(const Product& p, i64 batch, const Plan<E>& plan, const float* a, i64 panel,
                    i64 from, i64 to, float* c, int which) {
  alignas(64) float b[E::kWords * E::kCols];
  const Matrix& source = which ? p.b2 : p.b;
  const float* packed = (const float*)(which ? p.packed2 : p.packed);
  if (packed) {
    sums_of<E>(a, plan.words, packed + panel * plan.words * E::kCols, plan.words, 0, plan.left, 1,
               plan.height, plan.deep, from, to, true, c);
    return;
  }
  if (from == to) sums_of<E>(a, 0, b, 0, 0, plan.left, 1, plan.height, 1, 0, 0, true, c);
  for (i64 w = from; w < to; w += E::kWords) {
    const i64 end = least(to, w + E::kWords);
    pack_right<E>(source, batch, p.n, p.k, panel, w, end - w, b);
    sums_of<E>(a, plan.words, b, end - w, w, plan.left, 1, plan.height, plan.deep, w, end,
               w == from, c);
  }
}

template <class E>
APART void few_rows(const Product& p, i64 batch, const Plan<E>& plan, int threads) {
  const i64 tile = plan.left * plan.height * E::kCols;
  const i64 left_words = plan.left * plan.height * plan.words;
  const int pair = p.b2.data ? 2 : 1;
  const bool split = plan.slices > 1;
  const Scratch scratch(left_words + W + (split ? plan.right * plan.slices * pair * tile : 0));
  float *a = scratch.data(), *partial = a + ceil_div(left_words, W) * W;
  parallel_for(plan.left, useful_threads(4 * left_words, threads), [&](i64 i) {
    pack_left<E>(p, batch, plan, i, a + i * plan.height * plan.words);
  });
  parallel_for(plan.right * plan.slices, threads, [&](i64 task) {
    [[maybe_unused]] const typename E::Session session;
    alignas(64) float c[2][kBlockRows * E::kCols];
    const i64 panel = task / plan.slices, slice = task % plan.slices;
    const i64 per = ceil_div(ceil_div(plan.words, plan.slices), E::kWords) * E::kWords;
    const i64 from = least(plan.words, slice * per), to = least(plan.words, from + per);
    float *sums = c[0], *sums2 = c[1];
    if (split) {
      sums = partial + task * pair * tile;
      sums2 = sums + tile;
    }
    own_task<E>(p, batch, plan, a, panel, from, to, sums, 0);
    if (pair == 2) own_task<E>(p, batch, plan, a, panel, from, to, sums2, 1);
    if (!split)
      finish_block<E>(p, batch, sums, pair == 2 ? sums2 : nullptr, 0, plan.left,
                      panel * E::kCols, 1, plan.height);
  });
  if (!split) return;
  parallel_for(plan.right, threads, [&](i64 panel) {
    float* sums = partial + panel * plan.slices * pair * tile;
    for (i64 s = 1; s < plan.slices; ++s)
      for (i64 i = 0; i < pair * tile; i += W)
        store(sums + i, load(sums + i) + load(sums + s * pair * tile + i));
    finish_block<E>(p, batch, sums, pair == 2 ? sums + tile : nullptr, 0, plan.left,
                    panel * E::kCols, 1, plan.height);
  });
}

// Many rows: chunks of both sides are packed once, by all, for all.
template <class E>
APART void many_rows(const Product& p, i64 batch, const Plan<E>& plan, int threads) {
  const int pair = p.b2.data ? 2 : 1;
  const bool pack = !p.packed;
  const i64 a_panel = plan.height * plan.words, b_panel = E::kCols * plan.words;
  const i64 chunk = pack ? plan.right_chunk : plan.right;
  const i64 left_words = ceil_div(plan.left_chunk * a_panel, W) * W;
  const Scratch scratch(left_words + (pack ? pair * chunk * b_panel : 0));
  float *a = scratch.data(), *b = a + left_words;
  for (i64 i0 = 0; i0 < plan.left; i0 += plan.left_chunk) {
    const i64 lefts = least(plan.left_chunk, plan.left - i0);
    for (i64 j0 = 0; j0 < plan.right; j0 += chunk) {
      const i64 rights = least(chunk, plan.right - j0), fresh = j0 == 0 ? lefts : 0;
      parallel_for(fresh + (pack ? pair * rights : 0), threads, [&](i64 task) {
        if (task < fresh) return pack_left<E>(p, batch, plan, i0 + task, a + task * a_panel);
        const i64 j = task - fresh;
        pack_right<E>(j < rights ? p.b : p.b2, batch, p.n, p.k, j0 + j % rights, 0, plan.words,
                      b + j * b_panel);
      });
      const float* right = pack ? b : (const float*)p.packed;
      const float* right2 = pack ? b + rights * b_panel : (const float*)p.packed2;
      const Cut cut(lefts, rights, plan.height, E::kCols, plan.block, threads);
      const i64 down = ceil_div(lefts, cut.rows);
      parallel_for(cut.tasks(lefts, rights), threads, [&](i64 task) {
        [[maybe_unused]] const typename E::Session session;
        alignas(64) float c[2][kBlockRows * kBlockCols];
        const i64 i = task % down * cut.rows, j = task / down * cut.cols;
        const i64 rows = least(cut.rows, lefts - i), cols = least(cut.cols, rights - j);
        sums_of<E>(a + i * a_panel, plan.words, right + j * b_panel, plan.words, 0, rows, cols,
                   plan.height, plan.deep, 0, plan.words, true, c[0]);
        if (pair == 2)
          sums_of<E>(a + i * a_panel, plan.words, right2 + j * b_panel, plan.words, 0, rows, cols,
                     plan.height, plan.deep, 0, plan.words, true, c[1]);
        finish_block<E>(p, batch, c[0], pair == 2 ? c[1] : nullptr, (i0 + i) * plan.height, rows,
                        (j0 + j) * E::kCols, cols, plan.height);
      });
    }
  }
}

template <class E>
INLINE void product(const Product& p, i64 batch, int threads) {
  if (p.m <= kThinRows && p.b.data) return thin<typename E::T>(p, batch, threads);
  const Plan<E> plan(p);
  plan.own ? few_rows<E>(p, batch, plan, threads) : many_rows<E>(p, batch, plan, threads);
}

// The engine for a type at this level.
template <class F>
INLINE void with_engine(int dtype, const F& call) {
  if (dtype == kFloat32) call(Vectors<Single<float>, MultiplyAdd>{});
  if (dtype == kFloat16) call(Vectors<Single<f16>, MultiplyAdd>{});
#if defined(FASTLLM_TILES)
  if (dtype == kBFloat16) call(Tiles{});
#elif defined(FASTLLM_DOTS)
  if (dtype == kBFloat16) call(Vectors<Pair, DotPairs>{});
#else
  if (dtype == kBFloat16) call(Vectors<Single<bf16>, MultiplyAdd>{});
#endif
}

void multiply(const Product& p) {
  if (p.batch == 0 || p.m == 0 || p.n == 0) return;
  const double work = double(p.m) * double(p.n) * double(p.k + 16) * (p.b2.data ? 2 : 1);
  constexpr double kWorkPerThread = 1 << 18;
  const double worth = 1 + work * double(p.batch) / kWorkPerThread;
  const int threads = worth < p.threads ? int(worth) : p.threads;
  with_engine(p.dtype, [&](auto engine) {
    using E = decltype(engine);
    // Many small products: one a thread. Inside a task parallel_for is serial.
    const bool across = p.batch > 1 && (work < 8 * kWorkPerThread || p.batch >= 4 * threads);
    if (across)
      parallel_for(p.batch, threads, [&](i64 i) { product<E>(p, i, 1); });
    else
      for (i64 i = 0; i < p.batch; ++i) product<E>(p, i, threads);
  });
}

// ---- groups

constexpr i64 kPieceCols = 512;  // of the result a task; what tasks there are depends on sizes only

// The product of one group.
INLINE Product group_product(const Groups& g, i64 group) {
  const i64 size = g.each.dtype == kFloat32 ? 4 : 2, out_size = g.each.out_dtype == kFloat32 ? 4 : 2;
  const i64 from = group ? g.ends[group - 1] : 0, rows = g.ends[group] - from;
  Product p = g.each;
  if (g.inner) {
    p.k = rows;
    p.a.data = (const char*)p.a.data + from * p.a.col * size;
    p.b.data = (const char*)p.b.data + from * p.b.col * size;
    p.out = (char*)p.out + group * p.out_batch * out_size;
  } else {
    p.m = rows;
    p.a.data = (const char*)p.a.data + from * p.a.row * size;
    p.b.data = (const char*)p.b.data + group * p.b.batch * size;
    p.out = (char*)p.out + from * p.out_row * out_size;
    if (p.bias) p.bias = (const char*)p.bias + group * p.n * size;
  }
  return p;
}

// Up to kBlockRows x kPieceCols of a product's result.
INLINE Product piece_of(Product p, i64 row, i64 col) {
  const i64 size = p.dtype == kFloat32 ? 4 : 2, out_size = p.out_dtype == kFloat32 ? 4 : 2;
  p.m = least(kBlockRows, p.m - row);
  p.n = least(kPieceCols, p.n - col);
  p.a.data = (const char*)p.a.data + row * p.a.row * size;
  p.b.data = (const char*)p.b.data + col * p.b.row * size;
  p.out = (char*)p.out + (row * p.out_row + col) * out_size;
  if (p.bias) p.bias = (const char*)p.bias + col * size;
  return p;
}

INLINE i64 pieces_of(const Product& p) {
  return ceil_div(p.m, kBlockRows) * ceil_div(p.n, kPieceCols);
}

void multiply_groups(const Groups& g) {
  i64 pieces = 0;
  for (i64 group = 0; group < g.count; ++group) pieces += pieces_of(group_product(g, group));
  with_engine(g.each.dtype, [&](auto engine) {
    using E = decltype(engine);
    parallel_for(pieces, g.each.threads, [&](i64 piece) {
      i64 group = 0;
      Product p = group_product(g, group);
      for (i64 mine = pieces_of(p); piece >= mine; mine = pieces_of(p)) {
        piece -= mine;
        p = group_product(g, ++group);
      }
      const i64 across = ceil_div(p.n, kPieceCols);
      product<E>(piece_of(p, piece / across * kBlockRows, piece % across * kPieceCols), 0, 1);
    });
  });
}

int64_t packed_bytes(int dtype, int64_t n, int64_t k) {
  i64 words = 0;
  with_engine(dtype, [&](auto engine) {
    using E = decltype(engine);
    words = ceil_div(n, E::kCols) * E::kCols * E::words(k);
  });
  return 4 * words;
}

void pack(int dtype, const Matrix& b, int64_t n, int64_t k, void* packed, int threads) {
  with_engine(dtype, [&](auto engine) {
    using E = decltype(engine);
    const i64 words = E::words(k), panel = E::kCols * words;
    const i64 panels = ceil_div(n, E::kCols);
    parallel_for(panels, useful_threads(4 * panels * panel, threads), [&](i64 i) {
      pack_right<E>(b, 0, n, k, i, 0, words, (float*)packed + i * panel);
    });
  });
}

constexpr Kernels table = {multiply, multiply_groups, packed_bytes, pack, activation_backward, row_sum};
