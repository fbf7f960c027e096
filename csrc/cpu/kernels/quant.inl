// quantize and dequantize: one read, one write, but for scales that more than a cache holds share.
#include "cpu/kernels/elementwise.inl"
#include "cpu/kernels/quant_codes.inl"

// Codes wait here, one a byte, until they are written.
constexpr i64 kRoom = 4096;
// Values of one piece of work.
constexpr i64 kPiece = 8192;

template <class F>
INLINE void with_kind(int kind, bool zero, const F& f) {
  switch (kind) {
    case kInt8: return f(Int8{});
    case kInt4: return zero ? f(Int4Zero{}) : f(Int4{});
    case kNf4: return f(Nf4{});
    case kFp4: return f(Fp4{});
    case kE5m2: return f(E5m2{});
    default: return f(E4m3{});
  }
}

template <class C>
INLINE i64 row_bytes(i64 cols) {
  return C::kPacked ? (cols + 1) / 2 : cols;
}

// Columns a piece of work has: whole groups, and an even number.
INLINE i64 piece_of(const Shape& s) {
  if (s.group <= 0) return kPiece;
  return s.group >= kPiece ? s.group : kPiece / s.group * s.group;
}

// Calls work(row, from, n) for pieces of all rows, several to a task.
template <class F>
INLINE void deal(i64 rows, i64 cols, i64 piece, i64 bytes, int threads, const F& work) {
  if (rows == 0 || cols == 0) return;
  const i64 across = ceil_div(cols, piece), pieces = rows * across;
  threads = useful_threads(bytes, threads);
  const i64 least_step = most(1, kPiece / least(cols, piece));
  const i64 step = threads == 1 ? pieces : most(least_step, ceil_div(pieces, 16 * threads));
  parallel_for(ceil_div(pieces, step), threads, [&](i64 task) {
    const i64 end = least(pieces, (task + 1) * step);
    for (i64 i = task * step; i < end; ++i) {
      const i64 from = i % across * piece;
      work(i / across, from, least(piece, cols - from));
    }
  });
}

#include "cpu/kernels/quant_scales.inl"

#include "cpu/kernels/quant_decode.inl"

#include "cpu/kernels/quant_encode.inl"

#include "cpu/kernels/quant_fake.inl"

constexpr Kernels table = {quantize, dequantize, encode, fake, fake_grad};
