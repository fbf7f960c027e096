// Engines of the blocks: words of both sides, and what multiplies a tile of them.
//
// A tile is kRows rows of the weight; a row's words lie in blocks of 16 that are kStep words apart.
// kTerms: how many bf16 an activation is the sum of.

// Groups: what the integer sums of each stretch of k are worth, by row of the tile.
struct Worth {
  const int32_t* start;        // what sums begin with
  const float *scale, *shift;  // null scale: sums stay integers; null shift: none
  const float* totals;         // of the stretch, by column
};

template <class Step>
struct VectorTiles {
  static constexpr int kRows = kTileRows, kTerms = 1;
  static constexpr i64 kStep = 16, kDeep = 128;  // words multiplied at a time: they stay in L1
  static constexpr i64 kBlockRows = 128;         // decoded at a time: they stay in L2
  INLINE_MEMBER static i64 row(i64 r, i64 words) { return r * words; }
  struct Session {};
  // Words [at, at + deep) of a tile and of a panel.
  INLINE_MEMBER static void multiply(i64 deep, const float* a, i64 words, i64 at, const float* x,
                                     int cols, const Worth& worth, float* c, bool add) {
    a += at;
    x += at * cols;
    if (cols == W)
      multiply_by<1>(deep, a, words, x, worth, c, add);
    else
      multiply_by<kMostVectors>(deep, a, words, x, worth, c, add);
  }
  template <int V>
  INLINE_MEMBER static void multiply_by(i64 deep, const float* a, i64 words, const float* x,
                                        const Worth& worth, float* c, bool add) {
    if constexpr (!std::is_same_v<typename Step::Sum, Vec>)
      if (worth.scale)
        return micro_group<Step, V>(deep, a, words, x, worth.start, worth.scale, worth.shift,
                                    worth.totals, c, add);
    micro<Step, V>(deep, a, words, x, worth.start, c, add);
  }
};

struct Floats32 : VectorTiles<FloatDots> {
  using Word = float;
  static constexpr bool kInteger = false;
  static constexpr uint8_t kFlip = 0;
};
#if defined(FASTLLM_BYTE_DOTS)
struct Integers : VectorTiles<ByteDots> {
  using Word = int8_t;
  static constexpr bool kInteger = true;
  static constexpr uint8_t kFlip = 128;  // one side is unsigned
};
#else
struct Integers : VectorTiles<ShortDots> {
  using Word = int16_t;
  static constexpr bool kInteger = true;
  static constexpr uint8_t kFlip = 0;
};
#endif

#if defined(FASTLLM_TILES)
struct AmxTiles {
  static constexpr int kRows = 32, kTerms = 1;
  static constexpr i64 kStep = 512, kBlockRows = 256;
  static constexpr i64 kDeep = 1024;  // loading sums again costs more than what L1 would hold
  INLINE_MEMBER static i64 row(i64 r, i64) { return r * 16; }
  using Session = TileSession;
};
struct ByteTiles : AmxTiles {
  using Word = int8_t;
  static constexpr bool kInteger = true;
  static constexpr uint8_t kFlip = 0;
  INLINE_MEMBER static void multiply(i64 deep, const float* a, i64, i64 at, const float* x,
                                     int cols, const Worth&, float* c, bool add) {
    if (cols == 16)
      byte_tiles_2x1(deep / 16, a + at * kRows, x + at * 16, c, add);
    else
      byte_tiles_2x2(deep / 16, a + at * kRows, x + at * 32, c, add);
  }
};
struct HalfTiles : AmxTiles {
  using Word = bf16;
  static constexpr bool kInteger = false;
  static constexpr uint8_t kFlip = 0;
  INLINE_MEMBER static void multiply(i64 deep, const float* a, i64, i64 at, const float* x,
                                     int cols, const Worth&, float* c, bool add) {
    if (cols == 16)
      half_tiles_2x1(deep / 16, a + at * kRows, x + at * 16, c, add);
    else
      half_tiles_2x2(deep / 16, a + at * kRows, x + at * 32, c, add);
  }
};
using Floats16 = HalfTiles;
// float32 is three bf16 exactly, float16 two.
template <int N>
struct TermTiles : HalfTiles {
  static constexpr int kTerms = N;
};
#elif defined(FASTLLM_DOTS)
struct Floats16 : VectorTiles<PairDots> {
  using Word = bf16;
  static constexpr bool kInteger = false;
  static constexpr uint8_t kFlip = 0;
};
#else
using Floats16 = Floats32;
#endif
