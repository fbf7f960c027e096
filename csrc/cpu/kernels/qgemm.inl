// Linear layers with quantized weights. The weight is the row-major side of every product, so that
// its codes are read where they lie; the activations, which have to be touched anyway, are packed.
#include FASTLLM_WORDS
#if defined(FASTLLM_DOTS)
#include "cpu/simd/words_vnni.h"
#endif
#if defined(FASTLLM_TILES)
#include "cpu/simd/amx_bytes.h"
#endif

#include "cpu/kernels/activate.inl"

#include "cpu/kernels/gemm_pack.inl"

#include "cpu/kernels/qgemm_decode.inl"

#include "cpu/kernels/qgemm_activations.inl"

#if defined(FASTLLM_BYTE_DOTS)
#include "cpu/kernels/qgemm_dealt.inl"
#endif

#include "cpu/kernels/qgemm_micro.inl"

#include "cpu/kernels/qgemm_engines.inl"

#include "cpu/kernels/qgemm_blocks.inl"

#include "cpu/kernels/qgemm_thin.inl"

#if defined(FASTLLM_TILES)
#include "cpu/kernels/qgemm_few_tiles.inl"

#include "cpu/kernels/qgemm_few.inl"
#endif

#include "cpu/kernels/qgemm_loud.inl"

void multiply(const Product& p) {
  if (p.m == 0 || p.w.n == 0) return;
  const double work = double(p.m + 4) * double(p.w.n) * double(p.w.k + 16);
  constexpr double kWorkPerThread = 1 << 18;
  const double worth = 1 + work / kWorkPerThread;
  const int threads = worth < p.threads ? int(worth) : p.threads;
  with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#if defined(FASTLLM_TILES)
    if (few_pays<T>(p)) {
      if (few<T>(p, threads)) return;
      if (two_a_byte(p.w.kind) && !std::is_same_v<T, bf16>)  // the sum of terms of infinity is NaN
        return run_blocks<Floats32, T>(p, threads);
    }
#endif
    if (p.m > kPartTokens || (p.m > kThinTokens && !thin_parts_pay<T>(p)))
      return blocks<T>(p, threads);
    Product part = p;
    for (i64 m = 0; m < p.m; m += kThinTokens) {
      part.x = (const T*)p.x + m * p.x_row;
      part.out = (T*)p.out + m * p.w.n;
      part.m = least(kThinTokens, p.m - m);
      thin<T>(part, threads);
    }
  });
}

template <class C>
APART void decode_row(const Weight& w, i64 row, float* out) {
  each_half<C>(w, row, 0, w.k, [&](const uint8_t* p, i64 at, const auto& s) INLINE_LAMBDA {
    HalfOf v;
    C::template values<true>(s, p, v);
    put_half(out + at, v);
  });
}

void decode(const Decode& d) {
  const int threads = useful_threads(d.rows * d.w.k * 4, d.threads);
  const i64 width = ceil_div(d.w.k, kHalf) * kHalf;
  parallel_for(d.rows, threads, [&](i64 i) {
    const Scratch scratch(width);
    float* row = scratch.data();
    with_kind(d.w.kind, [&](auto kind) { decode_row<decltype(kind)>(d.w, d.from + i, row); });
    sweep(d.w.k, [&](auto lanes, i64 at, int) INLINE_LAMBDA {
      write_as(d.dtype, d.out, i * d.w.k + at, get(row + at, lanes), lanes);
    });
  });
}

constexpr Kernels table = {multiply, decode, loud};
