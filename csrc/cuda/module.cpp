// fastllm._cuda: kernels in CUDA C++. Pointers and the stream are integers, 0 for none; dtype
// codes 0 float32, 1 bfloat16, 2 float16. The caller has checked shapes and allocated.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <string_view>
#include <vector>

#include "cuda/adafactor.h"
#include "cuda/norm.h"
#include "cuda/norm_params.h"
#include "cuda/optim.h"
#include "cuda/quant.h"

namespace py = pybind11;
using namespace fastllm;

namespace {

template <typename T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(int error) {
  if (error != 0) throw std::runtime_error(std::string("CUDA: ") + error_text(error));
}

bool check_dtypes(int dtype, int weight_dtype) {
  if (dtype < 0 || dtype > 2) throw py::value_error("dtype: expected 0, 1 or 2");
  if (weight_dtype != dtype && weight_dtype != 0) {
    throw py::value_error("weight_dtype: expected dtype or 0");
  }
  return weight_dtype == 0;
}

void check_sizes(int64_t rows, int64_t cols) {
  if (rows < 1 || rows > INT32_MAX) throw py::value_error("rows: out of range");
  if (cols < 1 || cols > (int64_t{1} << 30)) throw py::value_error("cols: out of range");
}

// 16-byte accesses need rows that start on a multiple of 16 bytes.
template <typename... Pointers>
bool aligned(int dtype, int64_t cols, Pointers... pointers) {
  return cols % (dtype == 0 ? 4 : 8) == 0 && ((pointers % 16 == 0) && ...);
}

void forward(bool center, int dtype, int weight_dtype, uintptr_t input, uintptr_t residual,
             uintptr_t weight, uintptr_t bias, uintptr_t output, uintptr_t new_residual,
             int64_t rows, int64_t cols, float eps, float offset, int device, uintptr_t stream) {
  const bool wide = check_dtypes(dtype, weight_dtype);
  check_sizes(rows, cols);
  const Forward p = {pointer(input), pointer(residual), pointer(weight), pointer(bias),
                     pointer(output), pointer(new_residual), rows, static_cast<int>(cols),
                     eps, offset, wide};
  const bool fits =
      aligned(dtype, cols, input, residual, weight, bias, output, new_residual);
  py::gil_scoped_release release;
  check(norm_fwd(center, dtype, p, fits, device, pointer(stream)));
}

// How many float32 values the workspace of such a backward call has to hold.
int64_t workspace_size(int dtype, int sums, int64_t rows, int64_t cols, int device) {
  check_dtypes(dtype, dtype);
  check_sizes(rows, cols);
  int64_t size = 0;
  for (const bool fits : {false, aligned(dtype, cols)}) {  // the pointers are not known yet
    BackwardPlan plan;
    check(plan_backward(dtype, rows, cols, fits, device, &plan));
    size = std::max(size, plan.stats + plan.programs * cols * sums);
  }
  return size;
}

void backward(bool center, int dtype, int weight_dtype, uintptr_t grad_output,
                 uintptr_t grad_new_residual, uintptr_t input, uintptr_t weight,
                 uintptr_t grad_input, uintptr_t grad_weight, uintptr_t grad_bias,
                 uintptr_t workspace, int64_t rows, int64_t cols, float eps, float offset,
                 int device, uintptr_t stream) {
  const bool wide = check_dtypes(dtype, weight_dtype);
  check_sizes(rows, cols);
  const bool fits =
      aligned(dtype, cols, grad_output, grad_new_residual, input, weight, grad_input);
  BackwardPlan plan;
  check(plan_backward(dtype, rows, cols, fits, device, &plan));
  const int64_t sums = plan.programs * cols;
  Backward p = {};
  p.dy = pointer(grad_output);
  p.dh = pointer(grad_new_residual);
  p.h = pointer(input);
  p.weight = pointer(weight);
  p.dx = pointer(grad_input);
  p.dw = pointer(grad_weight);
  p.db = pointer(grad_bias);
  p.stats = pointer<float>(workspace);
  float* free = p.stats + plan.stats;
  p.dw_sums = grad_weight ? free : nullptr;
  p.db_sums = grad_bias ? free + (grad_weight ? sums : 0) : nullptr;
  p.rows = rows;
  p.cols = static_cast<int>(cols);
  p.eps = eps;
  p.offset = offset;
  p.wide = wide;
  p.cluster = plan.cluster;
  py::gil_scoped_release release;
  check(norm_bwd(center, dtype, p, plan, device, pointer(stream)));
}

template <typename T>
std::vector<T> unpacked(const py::bytes& bytes, const char* name) {
  const std::string_view view = bytes;
  if (view.size() % sizeof(T) != 0) throw py::value_error(std::string(name) + ": not whole entries");
  std::vector<T> out(view.size() / sizeof(T));
  std::memcpy(out.data(), view.data(), view.size());
  return out;
}

// rows, shares, uses: device memory; settings and counts: bytes, as the structs lie in memory.
void step(int kind, uintptr_t rows, uintptr_t shares, int64_t row_count, int64_t share_count,
          uintptr_t uses, uintptr_t squares, uintptr_t scale, uintptr_t found, uintptr_t norm,
          float max_norm, py::bytes settings, py::bytes counts, int device, uintptr_t stream) {
  const auto groups = unpacked<OptimSettings>(settings, "settings");
  const auto parts = unpacked<OptimCount>(counts, "counts");
  if (kind < kOptimAdam || kind > kOptimAlong) throw py::value_error("kind: expected 0 to 3");
  if (parts.size() * kOptimGroups < groups.size()) {
    throw py::value_error("counts: expected one for each 32 groups");
  }
  if (row_count < 0 || share_count < 0 || share_count > INT32_MAX) {
    throw py::value_error("share_count: out of range");
  }
  const OptimStep p = {pointer<const OptimRow>(rows), pointer<const OptimShare>(shares), row_count,
                       share_count, pointer<OptimUse>(uses), pointer<float>(squares),
                       pointer<const float>(scale), pointer<const float>(found),
                       pointer<float>(norm), max_norm};
  py::gil_scoped_release release;
  check(optim_step(kind, p, groups.data(), static_cast<int64_t>(groups.size()), parts.data(), device,
                   pointer(stream)));
}

// Addresses of device memory; see FactorStep.
void adafactor(uintptr_t rows, uintptr_t shares, uintptr_t moments, int64_t row_count,
               int64_t share_count, int64_t moment_count, uintptr_t lengths, uintptr_t factor,
               uintptr_t found, uintptr_t room, uintptr_t out, uintptr_t sums, uintptr_t sizes,
               double lr, double beta2_decay, double least, double d, float sign, int device,
               uintptr_t stream) {
  for (const int64_t count : {row_count, share_count, moment_count})
    if (count < 0 || count > INT32_MAX) throw py::value_error("counts: out of range");
  const FactorStep p = {pointer<const FactorRow>(rows), pointer<const FactorShare>(shares),
                        pointer<const FactorShare>(moments), row_count, share_count, moment_count,
                        pointer<const float>(lengths), pointer<const float>(factor),
                        pointer<const float>(found), pointer<float>(room), pointer<float>(out),
                        pointer<float>(sums), pointer<float>(sizes), lr, beta2_decay, least, d,
                        sign};
  py::gil_scoped_release release;
  check(adafactor_ways(p, device, pointer(stream)));
}

QuantWeight quant_weight(int kind, uintptr_t codes, int64_t n, int64_t k, int64_t row,
                         uintptr_t scales, uintptr_t zeros, int scale_type, int64_t scale_row,
                         int64_t group, uintptr_t table) {
  if (kind < kQuantInt8 || kind > kQuantFp4) throw py::value_error("kind: expected 0 to 3");
  if (kind >= kQuantNf4 && !table) throw py::value_error("table: expected with nf4 and fp4");
  if (n < 1 || n > INT32_MAX || k < 32 || k % 32 || group < 32 || (group != k && group % 32)) {
    throw py::value_error("n, k, group: out of range");
  }
  if (codes % 16 || row % 16) throw py::value_error("codes: expected rows on 16 bytes");
  return {kind, pointer(codes), n, k, row, pointer(scales), pointer(zeros), scale_type, scale_row,
          group, pointer<const float>(table)};
}

void gemv(int dtype, uintptr_t x, int64_t m, int64_t x_row, int kind, uintptr_t codes, int64_t n,
          int64_t k, int64_t row, uintptr_t scales, uintptr_t zeros, int scale_type,
          int64_t scale_row, int64_t group, uintptr_t table, uintptr_t bias, uintptr_t out,
          int device, uintptr_t stream) {
  check_dtypes(dtype, dtype);
  const QuantWeight w =
      quant_weight(kind, codes, n, k, row, scales, zeros, scale_type, scale_row, group, table);
  if (m < 1 || m > 1024 || !aligned(dtype, x_row, x)) throw py::value_error("x: does not fit");
  py::gil_scoped_release release;
  check(quant_gemv(dtype, {pointer(x), m, x_row, w, pointer(bias), pointer(out)}, device,
                   pointer(stream)));
}

void dequantize(int dtype, int kind, uintptr_t codes, int64_t n, int64_t k, int64_t row,
                uintptr_t scales, uintptr_t zeros, int scale_type, int64_t scale_row, int64_t group,
                uintptr_t table, uintptr_t out, int device, uintptr_t stream) {
  check_dtypes(dtype, dtype);
  const QuantWeight w =
      quant_weight(kind, codes, n, k, row, scales, zeros, scale_type, scale_row, group, table);
  if (!aligned(dtype, k, out)) throw py::value_error("out: does not fit");
  py::gil_scoped_release release;
  check(quant_dequantize(dtype, w, pointer(out), device, pointer(stream)));
}

// thresholds: bytes of 15 floats; empty for int8 and int4.
void quantize_to(int dtype, int kind, uintptr_t x, int64_t rows, int64_t k, int64_t group,
                 uintptr_t codes, uintptr_t scales, uintptr_t zeros, py::bytes thresholds,
                 uint64_t order, int device, uintptr_t stream) {
  check_dtypes(dtype, dtype);
  if (kind < kQuantInt8 || kind > kQuantFp4) throw py::value_error("kind: expected 0 to 3");
  if (rows < 1 || k < kQuantStep || k % kQuantStep || group < kQuantStep || group % kQuantStep ||
      group > k || rows > INT32_MAX / ((k + group - 1) / group)) {
    throw py::value_error("rows, k, group: out of range");
  }
  if (x % 16 || codes % 16) throw py::value_error("x, codes: expected on 16 bytes");
  Quantize p = {kind, pointer(x), rows, k, group, pointer(codes), pointer(scales), pointer(zeros),
                {}, order};
  const auto between = unpacked<float>(thresholds, "thresholds");
  if (between.size() != (kind >= kQuantNf4 ? 15 : 0)) {
    throw py::value_error("thresholds: expected 15 with nf4 and fp4");
  }
  std::copy(between.begin(), between.end(), p.thresholds);
  py::gil_scoped_release release;
  check(quantize(dtype, p, device, pointer(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "fastllm's CUDA C++ kernels; see fastllm.ops for their use";
  m.def("norm_fwd", &forward, py::arg("center"), py::arg("dtype"), py::arg("weight_dtype"),
        py::arg("input"), py::arg("residual"), py::arg("weight"), py::arg("bias"),
        py::arg("output"), py::arg("new_residual"), py::arg("rows"), py::arg("cols"),
        py::arg("eps"), py::arg("weight_offset"), py::arg("device"), py::arg("stream"));
  m.def("norm_bwd_workspace", &workspace_size, py::arg("dtype"), py::arg("sums"),
        py::arg("rows"), py::arg("cols"), py::arg("device"));
  m.def("norm_bwd", &backward, py::arg("center"), py::arg("dtype"), py::arg("weight_dtype"),
        py::arg("grad_output"), py::arg("grad_new_residual"), py::arg("input"),
        py::arg("weight"), py::arg("grad_input"), py::arg("grad_weight"), py::arg("grad_bias"),
        py::arg("workspace"), py::arg("rows"), py::arg("cols"), py::arg("eps"),
        py::arg("weight_offset"), py::arg("device"), py::arg("stream"));
  m.def("optim_step", &step, py::arg("kind"), py::arg("rows"), py::arg("shares"),
        py::arg("row_count"), py::arg("share_count"), py::arg("uses"), py::arg("squares"),
        py::arg("scale"), py::arg("found"), py::arg("norm"), py::arg("max_norm"),
        py::arg("settings"), py::arg("counts"), py::arg("device"), py::arg("stream"));
  m.def("adafactor", &adafactor, py::arg("rows"), py::arg("shares"), py::arg("moments"),
        py::arg("row_count"), py::arg("share_count"), py::arg("moment_count"), py::arg("lengths"),
        py::arg("factor"), py::arg("found"), py::arg("room"), py::arg("out"), py::arg("sums"),
        py::arg("sizes"), py::arg("lr"), py::arg("beta2_decay"), py::arg("least"), py::arg("d"),
        py::arg("sign"), py::arg("device"), py::arg("stream"));
  m.def("quant_gemv", &gemv, py::arg("dtype"), py::arg("x"), py::arg("m"), py::arg("x_row"),
        py::arg("kind"), py::arg("codes"), py::arg("n"), py::arg("k"), py::arg("row"),
        py::arg("scales"), py::arg("zeros"), py::arg("scale_type"), py::arg("scale_row"),
        py::arg("group"), py::arg("table"), py::arg("bias"), py::arg("out"), py::arg("device"),
        py::arg("stream"));
  m.def("quant_dequantize", &dequantize, py::arg("dtype"), py::arg("kind"), py::arg("codes"),
        py::arg("n"), py::arg("k"), py::arg("row"), py::arg("scales"), py::arg("zeros"),
        py::arg("scale_type"), py::arg("scale_row"), py::arg("group"), py::arg("table"),
        py::arg("out"), py::arg("device"), py::arg("stream"));
  m.def("quantize", &quantize_to, py::arg("dtype"), py::arg("kind"), py::arg("x"), py::arg("rows"),
        py::arg("k"), py::arg("group"), py::arg("codes"), py::arg("scales"), py::arg("zeros"),
        py::arg("thresholds"), py::arg("order"), py::arg("device"), py::arg("stream"));
}
