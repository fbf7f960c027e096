// Adafactor's directions: of all tensors of a parameter group at once. The launcher returns a
// cudaError_t.
#pragma once

#include <stdint.h>

namespace fastllm {

// One tensor: a line of the table in device memory, fields of 8 bytes. Offsets are in floats.
struct FactorRow {
  const void* grad;   // matrices of rows x cols in order, or n elements of a vector
  float* row_var;     // moments by row; a vector's: of each element
  float* col_var;     // moments by column; null for a vector
  const float* step;  // counted already
  int64_t type;       // of the gradient: 0 fp32, 1 bf16, 2 fp16
  int64_t n, rows, cols;
  int64_t parts;      // shares of each matrix
  int64_t by_row, by_col;     // room: [matrices, rows], [matrices, parts, cols]
  int64_t out;                // the direction, in the gradient's order
  int64_t first_share, shares;
  double floor;
};

// What a block of threads has: rows [first, last) of a matrix, or elements of a vector; part counts the
// shares of a matrix. Of a moments' launch: columns, or with last < 0 the rows of a matrix.
struct FactorShare {
  int64_t row, matrix, part, first, last;
};

struct FactorStep {
  const FactorRow* rows;
  const FactorShare *shares, *moments;
  int64_t row_count, share_count, moment_count;
  const float* lengths;  // norm of each parameter
  const float* factor;   // of gradients
  const float* found;    // not 0: moments stay; or null
  float *room, *out;     // by_row and by_col; directions
  float* sums;           // one a share: its direction's squares
  float* sizes;          // one a row: how far along its direction
  double lr, beta2_decay, least, d;
  float sign;  // -1 to maximize
};

static_assert(sizeof(FactorRow) == 15 * 8 && sizeof(FactorShare) == 5 * 8, "as Python packs them");

int adafactor_ways(const FactorStep& step, int device, void* stream);

}  // namespace fastllm
