// The arithmetic of attention on tiles: scores, probabilities and their products with values.
//
// Everything is transposed: a tile of scores is [keys][C queries], a query a lane. So maxima and
// sums over keys need no horizontal steps, and a tile of probabilities lies as the microkernels of
// gemm_micro.inl want their right side.

// 2^t by a polynomial with 1 at 0; exactly 0 up to t = -127, NaN at NaN.
template <int Degree>
INLINE Vec exp2_of(Vec t) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kFive[] = {1.0f, 0.6931470036506653f, 0.24022242426872253f,
                             0.05550733581185341f, 0.009671512991189957f, 0.001326472731307149f};
  constexpr float kSix[] = {1.0f,
                            0.6931471824645996f,
                            0.24022647738456726f,
                            0.055503323674201965f,
                            0.00961843691766262f,
                            0.0013398875016719103f,
                            0.00015353361959569156f};
  const Vec x = at_least(t, set1(-127.0f)), shifted = x + set1(kShift);
  const Vec r = x - (shifted - set1(kShift));
  const Vec p = Degree == 5 ? polynomial(r, kFive) : polynomial(r, kSix);
  return {(Floats)((Ints)p.v + ((Ints)shifted.v << 23))};
}

INLINE bool any(Ints mask) { return top_bits({(Floats)mask}) != 0; }

#if defined(FASTLLM_DOTS)
// bf16 of two vectors, lane by lane as pairs, and one behind the other.
INLINE Vec behind(Vec low, Vec high) {
  return {_mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(high.v, low.v))};
}
INLINE Vec join_pairs(Vec low, Vec high) {
  typedef uint16_t Order __attribute__((vector_size(64)));
  constexpr Order kOrder = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                            8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = _mm512_castps_si512(behind(low, high).v);
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16((__m512i)kOrder, both))};
}
#endif

// ---- microkernels of the backward pass

// c [Rows][kVectors W] += a b: a [panel][Rows of `row` words][deep words], b one panel after the
// other at b[panel]; a word of a is next to its neighbour.
template <int Rows, class Step, int Deep>
APART void micro_across(int panels, const float* a, i64 a_panel, const float* const* b, float* c) {
  Vec sum[Rows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sum[i][j] = zero();
  for (int p = 0; p < panels; ++p) {
    const float *left = a + p * a_panel, *right = b[p];
    for (int w = 0; w < Deep; ++w, right += kVectors * W) {
      Vec r[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) r[j] = load(right + j * W);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const Vec l = set1(left[i * Deep + w]);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[i][j] = Step::step(l, r[j], sum[i][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + (i * kVectors + j) * W;
      store(to, load(to) + sum[i][j]);
    }
}
template <class Step, int Deep, int Rows = kMostRows>
INLINE void across_of(int rows, int panels, const float* a, i64 a_panel, const float* const* b,
                      float* c) {
  if (rows == Rows) return micro_across<Rows, Step, Deep>(panels, a, a_panel, b, c);
  if constexpr (Rows > 1) across_of<Step, Deep, Rows - 1>(rows, panels, a, a_panel, b, c);
}

#if defined(FASTLLM_TILES)
// The same for 16 or 32 rows of a [rows][16 words].
APART void tiles_across(int rows, int panels, const float* a, i64 a_panel, const float* const* b,
                        float* c) {
  _tile_loadd(0, c, 128);
  _tile_loadd(1, c + 16, 128);
  if (rows == 32) {
    _tile_loadd(2, c + 512, 128);
    _tile_loadd(3, c + 528, 128);
  }
  for (int p = 0; p < panels; ++p, a += a_panel) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b[p], 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b[p] + 16, 128);
    _tile_dpbf16ps(1, 4, 7);
    if (rows == 32) {
      _tile_loadd(5, a + 256, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, 128);
  _tile_stored(1, c + 16, 128);
  if (rows == 32) {
    _tile_stored(2, c + 512, 128);
    _tile_stored(3, c + 528, 128);
  }
}
#endif

// ---- engines: those of gemm_micro.inl, and what attention adds to them

template <class E>
struct Traits;

template <class L>
struct Traits<Vectors<L, MultiplyAdd>> {
  using Engine = Vectors<L, MultiplyAdd>;
  using T = typename L::Type;
  static constexpr bool kPairs = false;
  static constexpr bool kApart = false;  // has products that a unit of their own makes
  static constexpr int kDegree = std::is_same_v<T, float> ? 6 : 5;  // of exp2_of
  static constexpr i64 kKeys = 128;       // of a tile
  static constexpr int kDeep = Engine::kCols;  // words of the C queries of a panel
  static void across(int rows, int panels, const float* a, i64 a_panel, const float* const* b,
                     float* c) {
    across_of<MultiplyAdd, kDeep>(rows, panels, a, a_panel, b, c);
  }
};
#if defined(FASTLLM_DOTS)
template <>
struct Traits<Vectors<Pair, DotPairs>> {
  using Engine = Vectors<Pair, DotPairs>;
  using T = bf16;
  static constexpr bool kPairs = true, kApart = false;
  static constexpr int kDegree = 5;
  static constexpr i64 kKeys = 128;
  static constexpr int kDeep = Engine::kCols / 2;
  static void across(int rows, int panels, const float* a, i64 a_panel, const float* const* b,
                     float* c) {
    across_of<DotPairs, kDeep>(rows, panels, a, a_panel, b, c);
  }
};
#endif
#if defined(FASTLLM_TILES)
template <>
struct Traits<Tiles> {
  using Engine = Tiles;
  using T = bf16;
  static constexpr bool kPairs = true, kApart = true;
  static constexpr int kDegree = 5;
  static constexpr i64 kKeys = 128;
  static constexpr int kDeep = 16;
  static void across(int rows, int panels, const float* a, i64 a_panel, const float* const* b,
                     float* c) {
    tiles_across(rows, panels, a, a_panel, b, c);
  }
};
#endif

// ---- operands

// How sums are made: words before they join the total, few where errors do not average out; and
// whether scores, of which the probabilities are exponentials, are summed in double.
struct Care {
  i64 chain;
  bool exact;
};

// How a tile of up to `keys` rows of `width` numbers is cut as the left side: along the numbers
// (scores), or along the keys (sums of rows). `n` rows of it may be in use.
template <class E>
struct Left {
  i64 keys, width;
  int height, turned_height;
  i64 words;  // of the width
  i64 chain;
  bool exact;
  Left(i64 keys_, i64 width_, Care care) : keys(keys_), width(width_) {
    chain = Traits<E>::kPairs ? E::kWords : least(care.chain, E::kWords);
    exact = care.exact && !Traits<E>::kPairs;
    height = E::rows(most(1, keys));
    turned_height = E::rows(most(1, width));
    words = E::words(width);
  }
  INLINE_MEMBER i64 panels(i64 n) const { return ceil_div(n, height); }
  INLINE_MEMBER i64 turned_panels() const { return ceil_div(width, turned_height); }
  INLINE_MEMBER i64 room() const { return ceil_div(panels(keys) * height * words, W) * W; }
  INLINE_MEMBER i64 turned_rows() const { return turned_panels() * turned_height; }
  INLINE_MEMBER i64 turned_room() const {
    return ceil_div(turned_rows() * E::words(keys), W) * W;
  }
  template <class T>
  INLINE_MEMBER void pack(const T* src, i64 row, i64 n, float* out) const {
    for (i64 i = 0; i < panels(n); ++i)
      E::pack_left(src + i * height * row, row, 1, least(height, n - i * height), width, words,
                   height, out + i * height * words);
  }
  template <class T>
  INLINE_MEMBER void pack_turned(const T* src, i64 row, i64 n, float* out) const {
    const i64 deep = E::words(n);
    for (i64 i = 0; i < turned_panels(); ++i)
      E::pack_left(src + i * turned_height, 1, row,
                   least(turned_height, width - i * turned_height), n, deep, turned_height,
                   out + i * turned_height * deep);
  }
};

// One panel of the left side by a right side of C columns.
template <class E>
INLINE void multiply_panel(int height, i64 words, i64 chain, const float* a, const float* b,
                           float* c, bool add) {
  for (i64 w = 0; w < words; w += chain)
    E::micro(height, least(chain, words - w), a + w * height, b + w * E::kCols, c, add || w);
}

// W doubles.
typedef double Wide __attribute__((vector_size(8 * W)));

// The same, summed in double and rounded once.
template <class E>
APART void multiply_exactly(int height, i64 words, const float* a, const float* b, float* c) {
  for (int i = 0; i < height; ++i)
    for (int v = 0; v < E::kCols; v += W) {
      Wide sum = {};
      for (i64 w = 0; w < words; ++w)
        sum += double(a[w * height + i]) *
               __builtin_convertvector(load(b + w * E::kCols + v).v, Wide);
      store(c + i * E::kCols + v, {__builtin_convertvector(sum, Floats)});
    }
}

// scores [n keys, in whole panels][C] = keys times the queries in b.
template <class E>
INLINE void scores_of(const Left<E>& left, i64 n, const float* a, const float* b, float* c) {
  if (left.exact) {
    for (i64 i = 0; i < left.panels(n); ++i)
      multiply_exactly<E>(left.height, left.words, a + i * left.height * left.words, b,
                          c + i * left.height * E::kCols);
    return;
  }
  for (i64 i = 0; i < left.panels(n); ++i)
    multiply_panel<E>(left.height, left.words, left.chain, a + i * left.height * left.words, b,
                      c + i * left.height * E::kCols, false);
}

// sums [width][C] (+)= the first n rows of a tile, packed with `packed` of them, weighted by
// b [n keys][C].
template <class E>
INLINE void mix_of(const Left<E>& left, i64 n, i64 packed, const float* a, const float* b, float* c,
                   bool add) {
  const i64 deep = E::words(n), step = left.turned_height, panel = step * E::words(packed);
  for (i64 i = 0; i < left.turned_panels(); ++i)
    multiply_panel<E>(left.turned_height, deep, left.chain, a + i * panel, b,
                      c + i * step * E::kCols, add);
}

// Rows of a score tile that the products touch when n keys are in use.
template <class E>
INLINE i64 touched(const Left<E>& left, i64 n) {
  return ceil_div(most(left.panels(n) * left.height, E::words(n) * E::kGroup), 2) * 2;
}

// Calls body(slot, item) for each item, in order of their numbers as threads come free; a slot is
// one thread's at a time.
template <class F>
INLINE void deal(i64 items, int threads, const F& body) {
  threads = int(most(1, least(threads, items)));
  i64 next = 0;
  parallel_for(threads, threads, [&](i64 slot) {
    for (;;) {
      const i64 item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (item >= items) return;
      body(slot, item);
    }
  });
}
