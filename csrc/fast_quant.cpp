// quant_linear's forward in one step: a small layer is done before Python has described it. None
// for what is not served here: that is left to the backend's forward.
#include <algorithm>
#include <array>
#include <cstdlib>

#include "cpu/kernels/qgemm.h"
#include "fast_call.h"
#include "ordinary.h"

namespace fastllm {
namespace {

// The type of scales or zeros; -1: none that the kernels read.
int scale_type(const dlpack::DataType& type) {
  if (type.code == dlpack::kBfloat) return qgemm::kScaleBFloat16;
  if (type.code == dlpack::kFloat && type.bits == 32) return qgemm::kScaleFloat32;
  if (type.code == dlpack::kFloat && type.bits == 16) return qgemm::kScaleFloat16;
  return type.bits == 8 ? qgemm::kScaleE8M0 : -1;
}

// The code of an activation's name, 0 for None; -1: no such activation.
int activation_of(PyObject* name) {
  constexpr std::array names{"gelu", "gelu_tanh", "silu", "relu", "relu2"};  // gemm.h's, in order
  if (name == Py_None) return gemm::kNone;
  if (!PyUnicode_Check(name)) return -1;
  for (size_t i = 0; i < names.size(); ++i)
    if (PyUnicode_CompareWithASCIIString(name, names[i]) == 0) return int(i) + 1;
  return -1;
}

// Whether the kernels read groups of so many numbers.
bool whole_vectors(int64_t group) { return group == 0 || group == -1 || group % 32 == 0; }

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// The layer's weight, from codes, scales and zeros, if they are as large as they must be.
bool read_weight(PyObject* const* args, int64_t k, int code, int64_t group, qgemm::Weight& w) {
  View codes, scales, zeros;
  const bool maybe_zeros = args[2] != Py_None;
  if (!codes.read_any(args[0]) || codes.t.ndim != 2 || codes.t.dtype.bits != 8) return false;
  if (!scales.read_any(args[1]) || (maybe_zeros && !zeros.read_any(args[2]))) return false;
  if (code < qgemm::kInt8 || code > qgemm::kMxFp8 || !whole_vectors(group))
    return false;
  const bool packed = code == qgemm::kInt4 || code == qgemm::kNf4 || code == qgemm::kFp4;
  const int64_t n = codes.t.shape[0], block = group < -1 ? -group : 1;
  const int64_t across = group == 0 || group == -1 ? 1 : parts(k, std::abs(group));
  const bool shifted = maybe_zeros && zeros.numel > 0;
  const int type = scale_type(scales.t.dtype);
  if (codes.t.shape[1] != (packed ? parts(k, 2) : k) || type < 0) return false;
  if (scales.numel != (group == -1 ? 1 : parts(n, block) * across)) return false;
  if (shifted && (zeros.numel != scales.numel || scale_type(zeros.t.dtype) != type)) return false;
  w = {code, static_cast<const uint8_t*>(codes.data()), n, k, codes.t.shape[1], scales.data(),
       shifted ? zeros.data() : nullptr, type, group == -1 ? 0 : across, block,
       group < -1 ? block : std::max<int64_t>(group, 0)};
  return true;
}

PyObject* fast_quant_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 11) return wrong_count(11, count);
  View x, bias;
  if (!x.read(args[0]) || x.t.ndim < 1 || x.t.ndim > kMostDims || !x.numel) return declined();
  const int64_t code = PyLong_AsLongLong(args[6]), group = PyLong_AsLongLong(args[7]);
  const int64_t activations = PyLong_AsLongLong(args[8]);
  const double threshold = PyFloat_AsDouble(args[10]);
  if (PyErr_Occurred()) return PyErr_Clear(), declined();
  const int activation = activation_of(args[9]);
  if (threshold != 0.0 || activation < 0 || activations == qgemm::kStatic) return declined();
  if (args[4] != Py_None && !(bias.read(args[4]) && bias.dtype == x.dtype)) return declined();
  const int dims = x.t.ndim;
  const int64_t k = x.t.shape[dims - 1], m = x.numel / k;
  qgemm::Weight w{};
  if (!read_weight(args + 1, k, int(code), group, w)) return declined();
  if (args[4] != Py_None && bias.numel != w.n) return declined();
  if (m * w.n * (x.dtype == kFloat32 ? 4 : 2) > kUnpooled) return declined();

  int64_t sizes[kMostDims];
  std::copy(x.t.shape, x.t.shape + dims, sizes);
  sizes[dims - 1] = w.n;
  qgemm::Product product{x.dtype, int(activations), x.data(), m, k, w,
                         args[4] == Py_None ? nullptr : bias.data(), 0.0f, activation, nullptr,
                         thread_count()};
  PyObject* made = allocate_shape(args[0], sizes, dims, product.out);
  if (made && !launch(qgemm::kernels().multiply, product, w.n * w.row)) Py_CLEAR(made);
  return made;
}

}  // namespace

void def_fast_quant(pybind11::module_& m) {
  def_fast<&fast_quant_linear>(m, "fast_quant_linear",
                               "input, codes, scales, zeros, bias, act_scale, code, group, "
                               "activations, activation, outlier_threshold");
}

}  // namespace fastllm
