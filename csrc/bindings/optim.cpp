// The optimizers in Python: lists of tensors, read through DLPack's exchange table anew in each
// call, so that no table of pointers can be stale.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <new>
#include <vector>

#include "bindings/bind.h"
#include "cpu/isa.h"
#include "cpu/kernels/optim.h"
#include "cpu/types.h"
#include "dlpack_exchange.h"

namespace fastllm::optim {
FASTLLM_LEVELS
}  // namespace fastllm::optim

namespace fastllm::bindings {
namespace {

using optim::Coefficients;
using optim::Tensor;

constexpr uint8_t kDlInt = 0, kDlUint = 1, kDlFloat8E4m3fn = 10;
constexpr int kOther = -1;

const dlpack::ExchangeApi* api = nullptr;

void bind(py::object tensor) {
  py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  auto* found = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!found) throw py::error_already_set();
  while (found && found->major != dlpack::kMajor) found = found->previous;
  if (found && found->view_of_object) api = found;
}

struct View {
  dlpack::Tensor t{};
  int64_t numel = 1;

  // A tensor on the CPU; else false.
  bool read(PyObject* object) {
    if (api->view_of_object(object, &t) != 0) return PyErr_Clear(), false;
    if (t.device.type != dlpack::kCpu || t.dtype.lanes != 1) return false;
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
  if (v.is(kDlInt, 8)) return optim::kSignedRoot;
  if (v.is(kDlUint, 8)) return optim::kFourthRoot;
  if (v.is(kDlFloat8E4m3fn, 8)) return place == 0 ? optim::kFp8 : optim::kFp8Square;
  return kOther;
}

// One parameter group as Python passes it: settings, then lists with one entry a tensor. A list may
// be None where the optimizer has no such thing.
enum Field {
  kSettings, kParams, kGrads, kState0, kState1, kState2, kScale0, kScale1, kMasters, kSteps, kFresh,
  kNumbers, kFields
};

struct Group {
  PyObject* field[kFields];
  Py_ssize_t count;
  double set[10];

  bool read(PyObject* tuple) {
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != kFields) return wrong();
    for (int f = 0; f < kFields; ++f) field[f] = PyTuple_GET_ITEM(tuple, f);
    if (!PyTuple_Check(field[kSettings]) || PyTuple_GET_SIZE(field[kSettings]) != 10 ||
        !PyList_Check(field[kParams]))
      return wrong();
    for (int i = 0; i < 10; ++i) set[i] = PyFloat_AsDouble(PyTuple_GET_ITEM(field[kSettings], i));
    if (PyErr_Occurred()) return false;
    count = PyList_GET_SIZE(field[kParams]);
    for (int f = kGrads; f < kFields; ++f)
      if (field[f] != Py_None && (!PyList_Check(field[f]) || PyList_GET_SIZE(field[f]) != count))
        return wrong();
    return true;
  }
  static bool wrong() {
    PyErr_SetString(PyExc_TypeError, "groups: expected tuples of settings and equally long lists");
    return false;
  }
  PyObject* get(Field f, Py_ssize_t i) const {
    if (field[f] == Py_None) return nullptr;
    PyObject* item = PyList_GET_ITEM(field[f], i);
    return item == Py_None ? nullptr : item;
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

bool read_count(PyObject* object, Count& out) {
  View v;
  if (!v.read(object) || v.numel != 1 || v.t.dtype.code != dlpack::kFloat) return false;
  out = {v.data(), v.t.dtype.bits == 64};
  return v.t.dtype.bits == 64 || v.t.dtype.bits == 32;
}

// Everything of one tensor but its coefficients; false when it is not an ordinary one.
bool read_tensor(const Group& g, Py_ssize_t i, Tensor& t, Count& count) {
  View param, grad;
  if (!param.read(g.get(kParams, i)) || !grad.read(g.get(kGrads, i))) return false;
  t.n = param.numel;
  t.param = param.data();
  t.grad = grad.data();
  t.param_type = param.type();
  t.grad_type = grad.type();
  if (t.param_type == kOther || t.grad_type == kOther || !param.dense() || !grad.like(param))
    return false;
  for (int k = 0; k < 3; ++k) {
    PyObject* state = g.get(Field(kState0 + k), i);
    if (!state) continue;
    View v, s;
    if (!v.read(state) || !v.like(param)) return false;
    t.state[k] = v.data();
    t.store[k] = store_of(v, k);
    if (t.store[k] == kOther) return false;
    if (t.store[k] <= optim::kHalf) continue;
    PyObject* scale = k < 2 ? g.get(Field(kScale0 + k), i) : nullptr;
    if (!scale || !s.read(scale) || s.type() != kFloat32 || !s.dense()) return false;
    if (s.numel != (t.n + optim::kScaled - 1) / optim::kScaled) return false;
    t.scale[k] = static_cast<float*>(s.data());
  }
  if (PyObject* master = g.get(kMasters, i)) {
    View v;
    if (!v.read(master) || v.type() != kFloat32 || !v.like(param)) return false;
    t.master = static_cast<float*>(v.data());
  }
  PyObject* step = g.get(kSteps, i);
  return !step || read_count(step, count);
}

uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0x735a2d97u;
  return x ^ (x >> 15);
}

// Powers of beta, each worked out once a call: all tensors of a group are usually at one step.
struct Powers {
  std::map<std::pair<double, double>, double> known;
  double operator()(double base, double exponent) {
    const auto [at, fresh] = known.try_emplace({base, exponent}, 0.0);
    if (fresh) at->second = std::pow(base, exponent);
    return at->second;
  }
};

// Settings: lr, beta1 or momentum, beta2 or dampening, eps, weight decay, decoupled, nesterov,
// gradient factor, stochastic, seed.
Coefficients coefficients(int kind, const double* set, double t, bool fresh, Powers& powers) {
  const double lr = set[0], one = set[1], two = set[2], decay = set[4];
  const bool decoupled = set[5] != 0;
  Coefficients c{};
  c.grad = float(set[7]);
  c.l2 = decoupled ? 0.0f : float(decay);
  c.decay = decoupled ? float(1 - lr * decay) : 1.0f;
  c.step = float(lr);
  c.mix1 = float(1 - one);
  c.keep2 = float(two);
  c.mix2 = float(1 - two);
  c.eps = float(set[3]);
  c.momentum = float(one);
  c.damp = fresh ? 1.0f : float(1 - two);
  c.nesterov = set[6] != 0;
  if (kind == optim::kAdam) {
    c.step = float(lr / (1 - powers(one, t)));
    c.root = float(1 / std::sqrt(1 - powers(two, t)));
  }
  return c;
}

// optim_step(kind, groups, threads): updates everything and returns None, or changes nothing and
// returns the places (counted through all groups) of tensors that it cannot read.
py::object step(int kind, py::list groups, int threads) {
  std::vector<Tensor> tensors;
  std::vector<Coefficients> uses;
  std::vector<Count> counts;
  std::vector<double> times;
  py::list odd;
  Powers powers;
  size_t place = 0;
  if (!api) throw std::runtime_error("optim_bind has not been called");
  for (py::handle entry : groups) {
    Group g;
    if (!g.read(entry.ptr())) throw py::error_already_set();
    tensors.reserve(tensors.size() + g.count);
    for (Py_ssize_t i = 0; i < g.count; ++i, ++place) {
      Tensor t{};
      Count count;
      if (!read_tensor(g, i, t, count)) {
        odd.append(place);
        continue;
      }
      const double time = count.data ? count.value() + 1 : 0.0;
      PyObject* fresh = g.get(kFresh, i);
      const uint32_t number = uint32_t(PyLong_AsUnsignedLongMask(g.get(kNumbers, i)));
      t.key = mixed(mixed(uint32_t(int64_t(g.set[9])) + 0x9e3779b9u * number) + uint32_t(time));
      t.stochastic = g.set[8] != 0 && t.param_type == kBFloat16 && !t.master;
      uses.push_back(coefficients(kind, g.set, time, fresh && PyObject_IsTrue(fresh), powers));
      tensors.push_back(t);
      counts.push_back(count);
      times.push_back(time);
    }
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  if (!odd.empty()) return odd;
  for (size_t i = 0; i < tensors.size(); ++i) tensors[i].use = &uses[i];
  {
    py::gil_scoped_release no_gil;
    optim::kernels().step({kind, tensors.data(), int64_t(tensors.size()), threads});
  }
  for (size_t i = 0; i < counts.size(); ++i)
    if (counts[i].data) counts[i].set(times[i]);
  return py::none();
}

// Reads gradients; false when one of them is not dense or not of a type that the kernels take.
bool read_gradients(const py::list& grads, std::vector<optim::Gradient>& out, py::list& odd) {
  if (!api) throw std::runtime_error("optim_bind has not been called");
  size_t place = 0;
  for (py::handle grad : grads) {
    View v;
    if (!v.read(grad.ptr()) || v.type() == kOther || !v.dense())
      odd.append(place);
    else
      out.push_back({v.numel, v.data(), v.type()});
    ++place;
  }
  return odd.empty();
}

// optim_measure(grads, threads): (sum of squares, largest magnitude), or the places of tensors that
// it cannot read. The magnitude is inf or NaN when an element is.
py::object measure(py::list grads, int threads) {
  std::vector<optim::Gradient> tensors;
  py::list odd;
  if (!read_gradients(grads, tensors, odd)) return odd;
  std::vector<double> squares(tensors.size());
  std::vector<float> largest(tensors.size());
  double sum = 0;
  uint32_t most = 0;
  {
    py::gil_scoped_release no_gil;
    optim::kernels().measure({tensors.data(), int64_t(tensors.size()), 1.0f, threads,
                              squares.data(), largest.data()});
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &largest[i], 4);
    most = std::max(most, bits);
    sum += squares[i];
  }
  float top;
  std::memcpy(&top, &most, 4);
  return py::make_tuple(sum, top);
}

// optim_scale(grads, factor, threads): multiplies in place and returns None, or changes nothing and
// returns the places of tensors that it cannot read.
py::object scale(py::list grads, float factor, int threads) {
  std::vector<optim::Gradient> tensors;
  py::list odd;
  if (!read_gradients(grads, tensors, odd)) return odd;
  {
    py::gil_scoped_release no_gil;
    optim::kernels().scale(
        {tensors.data(), int64_t(tensors.size()), factor, threads, nullptr, nullptr});
  }
  return py::none();
}

}  // namespace

void bind_optim(py::module_& m) {
  m.def("optim_bind", &bind, py::arg("tensor"), "Gives the optimizers torch.Tensor; once.");
  m.def("optim_step", &step, py::arg("kind"), py::arg("groups"), py::arg("threads"),
        "Updates all tensors, or returns the places of those that it cannot read.");
  m.def("optim_measure", &measure, py::arg("grads"), py::arg("threads"),
        "(sum of squares, largest magnitude), or the places of tensors that it cannot read.");
  m.def("optim_scale", &scale, py::arg("grads"), py::arg("factor"), py::arg("threads"),
        "Multiplies in place, or returns the places of tensors that it cannot read.");
}

}  // namespace fastllm::bindings
