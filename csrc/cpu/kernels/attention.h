// Fused attention: what a call is, and the table that every level fills.
#pragma once
#include <cstdint>
#include <utility>

namespace fastllm::attention {

// [batch][head][row] of adjacent numbers; strides in elements. Packed sequences have no batch
// stride: their rows start at Call::q_starts or k_starts.
struct Rows {
  void* data;
  int64_t batch, head, row;
};

// Keys or values of a cache as codes, whose rows have strides in bytes. scales, and zeros or null
// (those of nibbles are 8): rows of `groups` numbers of a DType, each for `group` neighbours, which
// are a multiple of 32 where there are several.
enum CodeKind : int { kPlain = -1, kByteCodes, kNibbleCodes };
struct Codes {
  int kind = kPlain, scale_type;
  int64_t group, groups;
  Rows scales, zeros;
};

enum MaskType : int { kMaskNone = -1, kMaskBool = 3 };  // else a DType: added to the scores

// Query i of head h sees key j iff -left <= j - (i + diagonal) <= right, where -1 is no limit.
// score = softcap(q k scale) - slope |i + diagonal - j| + mask, and a sink is one more score.
struct Call {
  int dtype;
  int64_t b, h, g, t, s, d, dv;     // t, s: of the longest sequence
  Rows q, k, v, out, lse;           // lse: fp32, row stride between neighbours; rows of one number
  const int32_t *q_starts, *k_starts;  // [b + 1] or null
  const int32_t* lengths;              // [b]: keys in use, or null: s of them
  const int32_t* pages;                // [b][pages_row]: k and v are [page][head][row] blocks
  int64_t pages_row, page;             // page: rows of a block
  Codes k_codes, v_codes;              // of few queries only
  int mask_type;
  const void* mask;
  int64_t mask_b, mask_h, mask_row, mask_col;
  const float* slopes;  // [b or 1][h] or null
  int64_t slopes_b;
  const float* sinks;  // [h] or null
  double scale;
  float softcap;
  int64_t left, right, diagonal;
  bool bottom_right;  // the diagonal of a sequence is its keys minus its queries
  double dropout;
  int64_t seed, first_batch;  // the number of the first of the batch, for the generator
  int threads;
};

// grad_lse, sink: fp32, as lse, or null. sink takes what each query adds to its sink's gradient.
// dmask: fp32 [b][h][t][s] by its strides, zeroed by the caller, or null. room: backward_room()
// floats, or null.
struct Gradient {
  Call call;
  Rows grad_out, grad_lse, sink, dq, dk, dv;
  float* dmask;
  int64_t dmask_b, dmask_h, dmask_row;
  float* room;
};

struct Kernels {
  void (*forward)(const Call&);
  int64_t (*backward_room)(const Call&);
  void (*backward)(const Gradient&);
};

const Kernels& kernels();

}  // namespace fastllm::attention
