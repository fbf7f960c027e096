// Forwards in one step: read, allocate, run, where Python code would cost as much as a small kernel.
//
// fast_<op>(args...) returns the op's result for contiguous CPU tensors of a dtype that the kernels
// take, and None for anything else: the backend's forward serves it or explains what is wrong.
// Whoever calls has found that nothing watches the call (head.h).
#include "fast_call.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/kernels/activation.h"
#include "cpu/kernels/embedding.h"
#include "cpu/kernels/norm.h"
#include "cpu/kernels/softmax.h"
#include "ordinary.h"

namespace py = pybind11;

namespace fastllm::activation {
const Kernels& kernels();  // bindings/activation.cpp
}  // namespace fastllm::activation
namespace fastllm::embedding {
const Kernels& kernels();            // bindings/embedding.cpp
int64_t first_outside(const Gather&, int64_t rows);
}  // namespace fastllm::embedding

namespace fastllm {
namespace {

// Reads an argument that may be None.
bool read_optional(PyObject* object, View& view) { return object == Py_None || view.read(object); }

// ---- norms

// The sizes of normalized_shape are the last ones of x, and those of each parameter.
bool shape_fits(PyObject* shape, const View& x, PyObject* const* params, const View* views,
                int count, int64_t& cols) {
  if (!PyTuple_CheckExact(shape)) return false;
  const Py_ssize_t dims = PyTuple_GET_SIZE(shape);
  if (dims < 1 || dims > x.t.ndim) return false;
  cols = 1;
  for (Py_ssize_t d = 0; d < dims; ++d) {
    const int64_t size = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, d));
    if (size < 0) return PyErr_Clear(), false;
    if (x.t.shape[x.t.ndim - dims + d] != size) return false;
    for (int p = 0; p < count; ++p)
      if (params[p] != Py_None && (views[p].t.ndim != dims || views[p].t.shape[d] != size))
        return false;
    cols *= size;
  }
  return cols > 0;
}

template <bool kLayer, bool kAdd>
PyObject* fast_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr int kInputs = kAdd ? 2 : 1, kParams = kLayer ? 2 : 1;
  constexpr int kCount = kInputs + 1 + kParams + 2;
  if (count != kCount) return wrong_count(kCount, count);
  PyObject* const* params = args + kInputs + 1;
  View x, residual, views[kParams];
  if (!x.read(args[0])) return declined();
  if (kAdd && !(residual.read(args[1]) && residual.same_as(x))) return declined();
  for (int p = 0; p < kParams; ++p)
    if (!read_optional(params[p], views[p])) return declined();
  const int weight_dtype = views[kLayer && params[0] == Py_None ? kParams - 1 : 0].dtype;
  for (int p = 0; p < kParams; ++p)
    if (params[p] != Py_None && views[p].dtype != weight_dtype) return declined();
  int64_t cols;
  if (!shape_fits(args[kInputs], x, params, views, kParams, cols)) return declined();
  const double eps = PyFloat_AsDouble(args[kCount - 2]);
  const double offset = PyFloat_AsDouble(args[kCount - 1]);
  if (PyErr_Occurred()) return PyErr_Clear(), declined();

  const int64_t bytes = x.bytes();
  void *out = nullptr, *sum = nullptr;
  PyObject* output = allocate_like(args[0], bytes, out);
  if (!output) return nullptr;
  PyObject* new_residual = kAdd ? allocate_like(args[0], bytes, sum) : nullptr;
  if (kAdd && !new_residual) return Py_DECREF(output), nullptr;
  const auto pointer = [&](int p) { return params[p] == Py_None ? nullptr : views[p].data(); };
  const norm::Forward arguments{x.dtype, weight_dtype, x.data(),
                                kAdd ? residual.data() : nullptr, pointer(0),
                                kLayer ? pointer(kParams - 1) : nullptr, out, sum,
                                x.numel / cols, cols, eps, float(offset), threads_for(bytes)};
  const norm::Kernels& table = norm::kernels();
  const bool ran = launch(kLayer ? table.layer_norm_fwd : table.rms_norm_fwd, arguments, bytes);
  PyObject* result = ran ? (kAdd ? PyTuple_Pack(2, output, new_residual) : Py_NewRef(output)) : nullptr;
  Py_DECREF(output);
  Py_XDECREF(new_residual);
  return result;
}

// ---- one tensor like another, or like two

// The result of a kernel that writes `bytes` like `object`; null with a Python error set.
template <class Arguments>
PyObject* run_like(PyObject* object, int64_t bytes, void (*kernel)(const Arguments&),
                   Arguments arguments) {
  PyObject* made = allocate_like(object, bytes, arguments.output);
  if (made && !launch(kernel, arguments, bytes)) Py_CLEAR(made);
  return made;
}

// Which gelu `approximate` says; -1: none of them.
int gelu_of(PyObject* approximate) {
  if (!PyUnicode_Check(approximate)) return -1;
  if (PyUnicode_CompareWithASCIIString(approximate, "none") == 0) return activation::kGelu;
  const bool tanh = PyUnicode_CompareWithASCIIString(approximate, "tanh") == 0;
  return tanh ? activation::kGeluTanh : -1;
}

template <int kFunction, bool kGated>
PyObject* fast_activation(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr int kTensors = kGated ? 2 : 1;
  constexpr bool kGelu = kFunction == activation::kGelu;
  constexpr int kCount = kTensors + kGelu;
  if (count != kCount) return wrong_count(kCount, count);
  View x, up;
  if (!x.read(args[0]) || (kGated && !(up.read(args[1]) && up.same_as(x)))) return declined();
  const int function = kGelu ? gelu_of(args[kTensors]) : kFunction;
  if (function < 0) return declined();
  const int64_t n = x.numel, bytes = x.bytes();
  return run_like(args[0], bytes, activation::kernels().forward,
                  activation::Forward{x.dtype, function, x.data(), kGated ? up.data() : nullptr,
                                      nullptr, 1, n, n, kGated ? n : 0, threads_for(bytes)});
}

template <bool kLog>
PyObject* fast_softmax(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) return wrong_count(2, count);
  View x;
  if (!PyLong_CheckExact(args[1]) || !x.read(args[0]) || x.t.ndim == 0) return declined();
  int64_t dim = PyLong_AsLongLong(args[1]);
  if (dim == -1 && PyErr_Occurred()) return PyErr_Clear(), declined();
  if (dim < -x.t.ndim || dim >= x.t.ndim) return declined();
  if (dim < 0) dim += x.t.ndim;
  int64_t outer = 1, inner = 1;
  for (int64_t d = 0; d < dim; ++d) outer *= x.t.shape[d];
  for (int64_t d = dim + 1; d < x.t.ndim; ++d) inner *= x.t.shape[d];
  const int64_t bytes = x.bytes();
  return run_like(args[0], bytes, softmax::kernels().softmax_fwd,
                  softmax::Forward{x.dtype, x.data(), nullptr, outer, x.t.shape[dim], inner, kLog,
                                   threads_for(bytes)});
}

// ---- rows of a matrix

// Indices as the kernels read them: int64 or int32, contiguous, on the CPU.
bool read_indices(PyObject* object, View& view, int& wide) {
  if (!view.read_any(object)) return false;
  wide = view.t.dtype.bits == 64;
  return view.t.dtype.code == dlpack::kInt && view.t.dtype.bits >= 32;
}

PyObject* fast_embedding(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4) return wrong_count(4, count);
  View weight, input;
  int wide;
  if (!weight.read(args[0]) || weight.t.ndim != 2 || !read_indices(args[1], input, wide) ||
      input.t.ndim > kMostDims)
    return declined();
  const int64_t rows = weight.t.shape[0], row_bytes = rows ? weight.bytes() / rows : 0;
  // a copy is as small as arithmetic on a quarter of its bytes
  const int64_t bytes = input.numel * row_bytes, size = bytes / 4;
  embedding::Gather arguments{wide, input.data(), weight.data(), nullptr, input.numel, row_bytes,
                              row_bytes, threads_for(size)};
  if (bytes > kUnpooled || embedding::first_outside(arguments, rows) >= 0) return declined();
  int64_t sizes[kMostDims + 1];
  const int dims = input.t.ndim;
  std::copy(input.t.shape, input.t.shape + dims, sizes);
  sizes[dims] = weight.t.shape[1];
  PyObject* made = allocate_shape(args[0], sizes, dims + 1, arguments.output);
  if (made && !launch(embedding::kernels().gather, arguments, size)) Py_CLEAR(made);
  return made;
}

}  // namespace

void def_fast_calls(py::module_& m) {
  def_fast<&fast_norm<false, false>>(m, "fast_rms_norm",
                                     "input, normalized_shape, weight, eps, weight_offset");
  def_fast<&fast_norm<true, false>>(m, "fast_layer_norm",
                                    "input, normalized_shape, weight, bias, eps, weight_offset");
  def_fast<&fast_norm<false, true>>(
      m, "fast_add_rms_norm", "input, residual, normalized_shape, weight, eps, weight_offset");
  def_fast<&fast_norm<true, true>>(
      m, "fast_add_layer_norm",
      "input, residual, normalized_shape, weight, bias, eps, weight_offset");
  def_fast<&fast_activation<activation::kSilu, false>>(m, "fast_silu", "input");
  def_fast<&fast_activation<activation::kGelu, false>>(m, "fast_gelu", "input, approximate");
  def_fast<&fast_activation<activation::kRelu2, false>>(m, "fast_relu2", "input");
  def_fast<&fast_activation<activation::kSilu, true>>(m, "fast_swiglu", "gate, up");
  def_fast<&fast_activation<activation::kGelu, true>>(m, "fast_geglu", "gate, up, approximate");
  def_fast<&fast_embedding>(m, "fast_embedding",
                            "weight, input, padding_idx, scale_grad_by_freq");
  def_fast<&fast_softmax<false>>(m, "fast_softmax", "input, dim");
  def_fast<&fast_softmax<true>>(m, "fast_log_softmax", "input, dim");
}

}  // namespace fastllm
