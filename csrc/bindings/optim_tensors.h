// What an optimizer's call says about its tensors, read through DLPack's exchange table anew in each
// call, so that no table of pointers can be stale.
#pragma once
#include <algorithm>
#include <vector>

#include "bindings/bind.h"
#include "cpu/kernels/optim.h"
#include "cpu/types.h"
#include "dlpack_exchange.h"
#include "ordinary.h"

namespace fastllm::bindings {
namespace {

using optim::Coefficients;
using optim::Tensor;

constexpr uint8_t kDlInt = 0, kDlUint = 1, kDlFloat8E4m3fn = 10;
constexpr int kOther = -1;

const dlpack::ExchangeApi* api = nullptr;

// What is asked of torch's objects: never freed, for the interpreter may end before this library.
struct Types {
  PyObject *tensor = nullptr, *parameter = nullptr, *is_neg = nullptr, *grad = nullptr;

  // A tensor that is no subclass's.
  bool plain(PyObject* object) const {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return type == tensor || type == parameter;
  }
  // Whether its bytes are not its values.
  bool negative(PyObject* object) const {
    PyObject* answer = ask_method(is_neg, object);
    if (!answer) throw py::error_already_set();
    Py_DECREF(answer);
    return answer == Py_True;
  }
  py::object grad_of(PyObject* param) const {
    PyObject* found = ask_attribute(grad, param);
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
  }
};
Types types;

void bind(py::object tensor, py::object parameter) {
  py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  auto* found = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!found) throw py::error_already_set();
  while (found && found->major != dlpack::kMajor) found = found->previous;
  if (found && found->view_of_object) api = found;
  types.is_neg = py::object(tensor.attr("is_neg")).release().ptr();
  types.grad = py::object(tensor.attr("grad")).release().ptr();
  types.tensor = tensor.release().ptr();
  types.parameter = parameter.release().ptr();
}

constexpr dlpack::Device kHere = {dlpack::kCpu, 0};

struct View {
  dlpack::Tensor t{};
  int64_t numel = 1;

  // A tensor on the CPU, or on another device; else false.
  bool read(PyObject* object, dlpack::Device where = kHere) {
    if (api->view_of_object(object, &t) != 0) return PyErr_Clear(), false;
    if (t.device.type != where.type || t.dtype.lanes != 1) return false;
    if (where.type != dlpack::kCpu && t.device.id != where.id) return false;
    for (int d = 0; d < t.ndim; ++d) numel *= t.shape[d];
    return true;
  }
  void* data() const { return static_cast<char*>(t.data) + t.byte_offset; }
  bool is(uint8_t code, int bits) const { return t.dtype.code == code && t.dtype.bits == bits; }
  int type() const {
    if (is(dlpack::kFloat, 32)) return kFloat32;
    if (is(dlpack::kFloat, 16)) return kFloat16;
    return is(dlpack::kBfloat, 16) ? int(kBFloat16) : kOther;
  }
  int64_t stride(int d) const {
    if (t.strides) return t.strides[d];
    int64_t s = 1;
    for (int k = t.ndim - 1; k > d; --k) s *= t.shape[k];
    return s;
  }
  // Its elements fill one run of memory, in whatever order.
  bool dense() const {
    if (!t.strides || numel == 0) return true;
    int64_t next = 1;
    bool in_order = true;
    for (int d = t.ndim - 1; d >= 0 && in_order; --d) {
      in_order = t.shape[d] == 1 || t.strides[d] == next;
      next *= t.shape[d];
    }
    if (in_order) return true;
    std::vector<std::pair<int64_t, int64_t>> dims;
    for (int d = 0; d < t.ndim; ++d)
      if (t.shape[d] != 1) dims.push_back({t.strides[d], t.shape[d]});
    std::sort(dims.begin(), dims.end());
    next = 1;
    for (const auto& [stride, size] : dims) {
      if (stride != next) return false;
      next *= size;
    }
    return true;
  }
  // Element by element, the same place in memory order.
  bool like(const View& o) const {
    if (t.ndim != o.t.ndim || numel != o.numel) return false;
    for (int d = 0; d < t.ndim; ++d)
      if (t.shape[d] != o.t.shape[d] || (t.shape[d] != 1 && stride(d) != o.stride(d))) return false;
    return true;
  }
};

int store_of(const View& v, int place) {
  if (v.is(dlpack::kFloat, 32)) return optim::kPlain;
  if (v.is(dlpack::kBfloat, 16)) return optim::kHalf;
  if (v.is(kDlUint, 8) && place == 0) return optim::kSignedOctaves;
  if (v.is(kDlInt, 8) && place == 1) return optim::kOctaves;
  if (v.is(kDlFloat8E4m3fn, 8)) return place == 0 ? optim::kFp8 : optim::kFp8Square;
  return kOther;
}

// One parameter group as Python passes it: settings, then lists with one entry a tensor. A list may
// be None where the optimizer has no such thing.
enum Field {
  kSettings, kParams, kGrads, kState0, kState1, kState2, kScale0, kScale1, kMasters, kSteps, kFresh,
  kNumbers, kFields
};

// The objects of one tensor, by Field; null where there is none.
struct Items {
  PyObject* of[kFields] = {};
};

constexpr int kNumbersInSettings = 10;

bool read_settings(PyObject* tuple, double* set) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != kNumbersInSettings) return false;
  for (int i = 0; i < kNumbersInSettings; ++i)
    set[i] = PyFloat_AsDouble(PyTuple_GET_ITEM(tuple, i));
  return !PyErr_Occurred();
}

struct Group {
  PyObject* field[kFields];
  Py_ssize_t count;
  double set[kNumbersInSettings];

  bool read(PyObject* tuple) {
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != kFields) return wrong();
    for (int f = 0; f < kFields; ++f) field[f] = PyTuple_GET_ITEM(tuple, f);
    if (!read_settings(field[kSettings], set) || !PyList_Check(field[kParams])) return wrong();
    count = PyList_GET_SIZE(field[kParams]);
    for (int f = kGrads; f < kFields; ++f)
      if (field[f] != Py_None && (!PyList_Check(field[f]) || PyList_GET_SIZE(field[f]) != count))
        return wrong();
    return true;
  }
  static bool wrong() {
    if (!PyErr_Occurred())
      PyErr_SetString(PyExc_TypeError,
                      "groups: expected tuples of settings and equally long lists");
    return false;
  }
  Items items(Py_ssize_t i) const {
    Items out;
    for (int f = kParams; f < kFields; ++f) {
      PyObject* item = field[f] == Py_None ? nullptr : PyList_GET_ITEM(field[f], i);
      out.of[f] = item == Py_None ? nullptr : item;
    }
    return out;
  }
};

struct Count {  // a state's `step`: a scalar tensor, float32 or float64
  void* data = nullptr;
  bool wide = false;
  double value() const { return wide ? *static_cast<double*>(data) : *static_cast<float*>(data); }
  void set(double t) const {
    if (wide)
      *static_cast<double*>(data) = t;
    else
      *static_cast<float*>(data) = float(t);
  }
};

bool read_count(PyObject* object, Count& out, dlpack::Device where) {
  View v;
  if (!v.read(object, where) || v.numel != 1 || v.t.dtype.code != dlpack::kFloat) return false;
  out = {v.data(), v.t.dtype.bits == 64};
  return v.t.dtype.bits == 64 || v.t.dtype.bits == 32;
}

// Everything of one tensor but its coefficients; false when it is not an ordinary one.
bool read_tensor(const Items& item, Tensor& t, Count& count, dlpack::Device where = kHere) {
  View param, grad;
  if (!param.read(item.of[kParams], where) || !grad.read(item.of[kGrads], where)) return false;
  t.n = param.numel;
  t.param = param.data();
  t.grad = grad.data();
  t.param_type = param.type();
  t.grad_type = grad.type();
  if (t.param_type == kOther || t.grad_type == kOther || !param.dense() || !grad.like(param))
    return false;
  for (int k = 0; k < 3; ++k) {
    PyObject* state = item.of[kState0 + k];
    if (!state) continue;
    View v, s;
    if (!v.read(state, where) || !v.like(param)) return false;
    t.state[k] = v.data();
    t.store[k] = store_of(v, k);
    if (t.store[k] == kOther) return false;
    if (t.store[k] <= optim::kHalf) continue;
    PyObject* scale = k < 2 ? item.of[kScale0 + k] : nullptr;
    if (!scale || !s.read(scale, where) || s.type() != kFloat32 || !s.dense()) return false;
    if (s.numel < (t.n + optim::kScaled - 1) / optim::kScaled) return false;  // a shard may have more
    t.scale[k] = static_cast<float*>(s.data());
  }
  if (PyObject* master = item.of[kMasters]) {
    View v;
    if (!v.read(master, where) || v.type() != kFloat32 || !v.like(param)) return false;
    t.master = static_cast<float*>(v.data());
  }
  PyObject* step = item.of[kSteps];
  return !step || read_count(step, count, where);
}

}  // namespace
}  // namespace fastllm::bindings
