// Many tokens of int8 by int8 rows, in tiles: tokens are the left side here, so that sums come out
// as rows of the result and need not be turned. The weight is turned instead, once for all tokens.

constexpr i64 kPanel = 32, kStepBytes = 2048;  // rows of a panel; bytes of their 64 numbers a step
constexpr i64 kManyTokens = 128;               // fewer do not repay turning the weight
constexpr i64 kPackedSide = 16 << 20;          // bytes of either side packed at a time
constexpr i64 kFlatSteps = 16;                 // a token panel of so many steps stays in L1

INLINE bool many(const Product& p) {
  return !p.w.group && p.w.kind == kInt8 && p.w.k <= kLongestInt32 && p.m >= kManyTokens &&
         4 * p.m >= p.w.k;
}

// c [2][2][16][16] = a b^T for panels [steps][2][16][64] of tokens and [steps][2][16][16][4] of
// the weight. The weight's lines come from L2 and are asked for one step ahead.
APART void panel_tiles(i64 steps, const int8_t* a, const int8_t* b, float* c) {
  const auto ask = [&](int from) INLINE_LAMBDA {
#pragma GCC unroll 8
    for (int i = from; i < from + 8; ++i)
      _mm_prefetch((const char*)b + kStepBytes + 64 * i, _MM_HINT_T0);
  };
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (i64 s = 0; s < steps; ++s, a += kStepBytes, b += kStepBytes) {
    ask(0);
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_dpbssd(0, 4, 6);
    ask(8);
    _tile_loadd(7, b + 1024, 64);
    _tile_dpbssd(1, 4, 7);
    ask(16);
    _tile_loadd(5, a + 1024, 64);
    _tile_dpbssd(2, 5, 6);
    ask(24);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + 256, 64);
  _tile_stored(2, c + 512, 64);
  _tile_stored(3, c + 768, 64);
}

template <class T>
struct Many {
  const Product& p;
  const i64 steps;  // of 64 along k
  int8_t *tokens, *weight;
  float *scales, *numbers;  // a token; a row of the weight: its scale and, behind all, its bias
  i64 rows;                 // of the weight that numbers has room for

  INLINE_MEMBER i64 panel_bytes() const { return steps * kStepBytes; }

  // Tokens [from, from + kPanel), zeros behind the last one.
  INLINE_MEMBER void pack_tokens(i64 from, int8_t* out, float* scale) const {
    const Scratch scratch(steps * 16);
    int8_t* codes = (int8_t*)scratch.data();
    const float* given = p.activations == kStatic ? &p.act_scale : nullptr;
    for (i64 i = 0; i < kPanel; ++i) {
      int8_t* to = out + i * 64;
      if (from + i < p.m) {
        const T* x = (const T*)p.x + (from + i) * p.x_row;
        scale[i] = quantize_token(x, p.w.k, steps * 64, given, codes);
        for (i64 s = 0; s < steps; ++s)
          store_words(to + s * kStepBytes, load_words(codes + s * 64));
      } else {
        scale[i] = 0.0f;
        for (i64 s = 0; s < steps; ++s) store_words(to + s * kStepBytes, IntVec{});
      }
    }
  }

  // Rows [from, from + kPanel) of the weight, four numbers of each side by side.
  INLINE_MEMBER void pack_weight(i64 from, int8_t* out) const {
    for (i64 half = 0; half < 2; ++half)
      for (i64 s = 0; s < steps; ++s) {
        Vec block[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          const i64 row = from + half * W + i, left = row < p.w.n ? p.w.k - s * 64 : 0;
          const i64 at = least(row, p.w.n - 1) * p.w.row + s * 64;
          block[i] = from_bits(load_codes(p.w.codes + at, left));
        }
        transpose(block);
        float* to = (float*)(out + s * kStepBytes + half * 1024);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(to + i * W, block[i]);
      }
  }

  // What sums of rows [from, from + kPanel) of the weight are multiplied with, and what is added.
  INLINE_MEMBER void read_numbers(i64 from, float* out) const {
    for (i64 i = 0; i < kPanel; ++i) {
      const i64 row = least(from + i, p.w.n - 1);
      out[i] = scale_at(p.w.scales, p.w.scale_type, scale_index(p.w, row, 0));
    }
    for (i64 i = 0; p.bias && i < kPanel && from + i < p.w.n; i += W)
      store(out + rows + i, load((const T*)p.bias + from + i, int(least(W, p.w.n - from - i))));
  }

  // A panel of tokens by columns [n, n + kPanel), from their sums.
  INLINE_MEMBER void finish(const float* sums, i64 token, i64 n, const float* number,
                            const float* scale) const {
    const i64 count = least(kPanel, p.m - token), columns = least(kPanel, p.w.n - n);
    T* to = (T*)p.out + token * p.w.n + n;
    const auto row = [&](i64 i, int h, auto lanes) INLINE_LAMBDA {
      const IntVec sum = load_words(sums + (i / W * 2 * W + h * W + i % W) * W);
      Vec v = to_float(sum) * load(number + h * W) * set1(scale[i]);
      if (p.bias) v = v + load(number + rows + h * W);
      if (p.activation) v = activate<false>(p.activation, v).value;
      put_quick<false>(to + i * p.w.n + h * W, v, lanes);
    };
    if (columns == kPanel) {
      for (i64 i = 0; i < count; ++i) {
        row(i, 0, All{});
        row(i, 1, All{});
      }
      return;
    }
    for (i64 i = 0; i < count; ++i) {
      row(i, 0, First{int(least(W, columns))});
      if (columns > W) row(i, 1, First{int(columns - W)});
    }
  }

  // Token panels [from, to) by panels [left, right) of the weight, counted from token and row
  // `first` and `row`.
  __attribute__((noinline)) void task(i64 from, i64 to, i64 left, i64 right, i64 first,
                                      i64 row) const {
    const TileSession session;
    alignas(64) float sums[4 * W * W];
    for (i64 n = left; n < right; ++n)
      for (i64 m = from; m < to; ++m) {
        panel_tiles(steps, tokens + m * panel_bytes(), weight + n * panel_bytes(), sums);
        finish(sums, first + m * kPanel, row + n * kPanel, numbers + n * kPanel,
               scales + m * kPanel);
      }
  }

  void run(i64 first, i64 row, i64 down, i64 across, bool fresh, int threads) const {
    parallel_for(across + (fresh ? down : 0), threads, [&](i64 i) {
      if (i < across) {
        pack_weight(row + i * kPanel, weight + i * panel_bytes());
        read_numbers(row + i * kPanel, numbers + i * kPanel);
      } else {
        pack_tokens(first + (i - across) * kPanel, tokens + (i - across) * panel_bytes(),
                    scales + (i - across) * kPanel);
      }
    });
    const i64 tall = steps <= kFlatSteps ? 1 : 8, blocks = ceil_div(down, tall);
    i64 wide = across;
    while (wide > 1 && blocks * ceil_div(across, wide) < 4 * threads) wide = ceil_div(wide, 2);
    parallel_for(blocks * ceil_div(across, wide), threads, [&](i64 i) {
      const i64 from = i % blocks * tall, left = i / blocks * wide;
      task(from, least(down, from + tall), left, least(across, left + wide), first, row);
    });
  }
};

template <class T>
APART void run_many(const Product& p, int threads) {
  const i64 steps = ceil_div(p.w.k, 64), fits = most(1, kPackedSide / (steps * kStepBytes));
  const i64 down = least(fits, ceil_div(p.m, kPanel));
  const i64 across = least(fits, ceil_div(p.w.n, kPanel));
  const i64 panel = steps * (kStepBytes / 4);
  const Scratch scratch((down + across) * panel + (down + 2 * across) * kPanel);
  float *weight = scratch.data() + down * panel, *scales = weight + across * panel;
  int8_t* tokens = (int8_t*)scratch.data();
  float* numbers = scales + down * kPanel;
  const Many<T> sides{p, steps, tokens, (int8_t*)weight, scales, numbers, across * kPanel};
  for (i64 first = 0; first < p.m; first += down * kPanel)
    for (i64 row = 0; row < p.w.n; row += across * kPanel)
      sides.run(first, row, least(down, ceil_div(p.m - first, kPanel)),
                least(across, ceil_div(p.w.n - row, kPanel)), row == 0, threads);
}
