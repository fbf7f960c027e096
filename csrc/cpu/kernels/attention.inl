// Fused attention: forward, backward, and forward of few queries.
#include "cpu/kernels/rows.inl"

#include "cpu/kernels/gemm_pack.inl"

#include "cpu/kernels/gemm_micro.inl"

#include "cpu/kernels/attention_tiles.inl"

#include "cpu/kernels/attention_scores.inl"

#include "cpu/kernels/attention_forward.inl"

#include "cpu/kernels/attention_pipeline.inl"

#include "cpu/kernels/attention_decode_steps.inl"

#if defined(FASTLLM_DOTS)
#include "cpu/kernels/attention_decode_digits.inl"
#endif

#include "cpu/kernels/attention_decode.inl"

#include "cpu/kernels/attention_gradients.inl"

#include "cpu/kernels/attention_backward.inl"

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

void forward(const Call& c) {
  if (c.b == 0 || c.h == 0 || c.t == 0) return;
  if (decodes(c)) return Decode(c).run();
  with_engine(c.dtype, [&](auto engine) { run_forward<decltype(engine)>(c); });
}

int64_t backward_room(const Call& c) {
  i64 room = 0;
  with_engine(c.dtype, [&](auto engine) { room = BackwardPlan<decltype(engine)>(c).room(); });
  return room;
}

void backward(const Gradient& grad) {
  if (grad.call.b == 0 || grad.call.h == 0) return;
  with_engine(grad.call.dtype, [&](auto engine) { run_backward<decltype(engine)>(grad); });
}

constexpr Kernels table = {forward, backward_room, backward};
