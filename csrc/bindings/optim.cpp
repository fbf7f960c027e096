// The optimizers in Python: groups of tensors or of an optimizer's own entries, and one call.
#include <cmath>
#include <cstring>
#include <map>
#include <vector>

#include "bindings/optim_tensors.h"
#include "cpu/isa.h"

namespace fastllm::optim {
FASTLLM_LEVELS
}  // namespace fastllm::optim

namespace fastllm::bindings {
namespace {

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

// A step's tensors as the kernels want them.
struct Batch {
  int kind;
  std::vector<Tensor> tensors;
  std::vector<Coefficients> uses;
  std::vector<Count> counts;
  std::vector<double> times;
  Powers powers;
  Coefficients use{};
  const double* last_set = nullptr;
  bool last_fresh = false;

  explicit Batch(int which) : kind(which) {}
  // Settings are read anew, perhaps at the same address.
  void begin_group() { last_set = nullptr; }
  void reserve(size_t more) {
    tensors.reserve(tensors.size() + more), uses.reserve(uses.size() + more);
    counts.reserve(counts.size() + more), times.reserve(times.size() + more);
  }
  // false when the tensor is not an ordinary one.
  bool add(const double* set, const Items& item, uint32_t number, bool fresh) {
    Tensor t{};
    Count count;
    if (!read_tensor(item, t, count)) return false;
    const double time = count.data ? count.value() + 1 : 0.0;
    t.key = mixed(mixed(uint32_t(int64_t(set[9])) + 0x9e3779b9u * number) + uint32_t(time));
    t.stochastic = set[8] != 0 && t.param_type == kBFloat16 && !t.master;
    // the same as the last one's, as a rule
    if (uses.empty() || set != last_set || time != times.back() || fresh != last_fresh)
      use = coefficients(kind, set, time, fresh, powers);
    last_set = set, last_fresh = fresh;
    uses.push_back(use);
    tensors.push_back(t);
    counts.push_back(count);
    times.push_back(time);
    return true;
  }
  void run(int threads) {
    for (size_t i = 0; i < tensors.size(); ++i) tensors[i].use = &uses[i];
    {
      py::gil_scoped_release no_gil;
      optim::kernels().step({kind, tensors.data(), int64_t(tensors.size()), threads});
    }
    for (size_t i = 0; i < counts.size(); ++i)
      if (counts[i].data) counts[i].set(times[i]);
  }
};

// optim_step(kind, groups, threads): updates everything and returns None, or changes nothing and
// returns the places (counted through all groups) of tensors that it cannot read.
py::object step(int kind, py::list groups, int threads) {
  Batch batch(kind);
  py::list odd;
  size_t place = 0;
  if (!api) throw std::runtime_error("optim_bind has not been called");
  for (py::handle entry : groups) {
    Group g;
    if (!g.read(entry.ptr())) throw py::error_already_set();
    batch.begin_group();
    for (Py_ssize_t i = 0; i < g.count; ++i, ++place) {
      const Items item = g.items(i);
      const uint32_t number = uint32_t(PyLong_AsUnsignedLongMask(item.of[kNumbers]));
      const bool fresh = item.of[kFresh] && PyObject_IsTrue(item.of[kFresh]);
      if (!batch.add(g.set, item, number, fresh)) odd.append(place);
    }
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  if (!odd.empty()) return odd;
  batch.run(threads);
  return py::none();
}

// A line of the table that the CUDA kernels read: OptimRow in csrc/cuda/optim_params.h.
struct Row {
  uint64_t param, grad, master, state[3], scale[2], step;
  int64_t n, types, number, group, fresh;
};

uint64_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// optim_rows(groups, device type, device id): the table of groups as optim_step() has them, as bytes,
// for tensors that are on that device; or the places of those that the kernels do not take.
py::object rows(py::list groups, int device_type, int device_id) {
  if (!api) throw std::runtime_error("optim_bind has not been called");
  std::vector<Row> lines;
  py::list odd;
  size_t place = 0;
  int64_t number = 0;
  for (py::handle entry : groups) {
    Group g;
    if (!g.read(entry.ptr())) throw py::error_already_set();
    for (Py_ssize_t i = 0; i < g.count; ++i, ++place) {
      const Items item = g.items(i);
      Tensor t{};
      Count count;
      if (!read_tensor(item, t, count, {device_type, device_id}) || count.wide) {
        odd.append(place);
        continue;
      }
      Row row{address(t.param), address(t.grad), address(t.master), {}, {}, address(count.data),
              t.n, t.param_type | t.grad_type << 8, 0, number, 0};
      uint64_t all = row.param | row.grad | row.master;
      for (int k = 0; k < 3; ++k) {
        row.state[k] = address(t.state[k]);
        row.types |= int64_t(t.store[k]) << (16 + 8 * k);
        all |= row.state[k];
        if (k < 2) row.scale[k] = address(t.scale[k]);
      }
      row.types |= int64_t(all % 16 == 0) << 40;
      row.number = uint32_t(PyLong_AsUnsignedLongMask(item.of[kNumbers]));
      row.fresh = item.of[kFresh] && PyObject_IsTrue(item.of[kFresh]);
      lines.push_back(row);
    }
    ++number;
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  if (!odd.empty()) return odd;
  return py::bytes(reinterpret_cast<const char*>(lines.data()), lines.size() * sizeof(Row));
}

// Looks parameters up in an optimizer's state. Its entries are usually in the parameters' order, and
// then none of them has to be hashed, which is a call of Python.
class States {
 public:
  explicit States(PyObject* dict) : dict_(dict) { advance(); }

  // Borrowed; null without an entry (an error may be set).
  PyObject* of(PyObject* param) {
    if (param != key_) return PyDict_GetItemWithError(dict_, param);
    PyObject* found = value_;
    advance();
    return found;
  }

 private:
  void advance() {
    if (!PyDict_Next(dict_, &at_, &key_, &value_)) key_ = value_ = nullptr;
  }
  PyObject *dict_, *key_ = nullptr, *value_ = nullptr;
  Py_ssize_t at_ = 0;
};

// optim_step_all(kind, groups, state, threads): the same for groups of (settings, parameters, names
// of what their states have, number of the first parameter), where gradients and states are looked
// up here. Returns the updated parameters, or changes nothing and returns None as soon as there is
// something out of the ordinary: a state to begin with, a subclass, another device.
py::object step_all(int kind, py::list groups, py::dict state, int threads) {
  Batch batch(kind);
  std::vector<py::object> alive;  // gradients and states: another thread may replace them
  py::list done;
  if (!api) throw std::runtime_error("optim_bind has not been called");
  States states(state.ptr());
  for (py::handle entry : groups) {
    auto [settings, params, names, first] = entry.cast<std::tuple<py::tuple, py::list, py::tuple, int64_t>>();
    double set[kNumbersInSettings];
    if (!read_settings(settings.ptr(), set) || names.size() != kFields) Group::wrong();
    if (PyErr_Occurred()) throw py::error_already_set();
    batch.begin_group();
    batch.reserve(params.size());
    alive.reserve(alive.size() + 4 * params.size());
    bool stateful = false;
    for (int f = kState0; f < kFields; ++f) stateful |= PyTuple_GET_ITEM(names.ptr(), f) != Py_None;
    for (Py_ssize_t i = 0; i < Py_ssize_t(params.size()); ++i) {
      PyObject* param = PyList_GET_ITEM(params.ptr(), i);
      PyObject* own = states.of(param);
      if (PyErr_Occurred()) throw py::error_already_set();
      if (!types.plain(param)) return py::none();
      py::object grad = types.grad_of(param);
      if (grad.is_none()) continue;
      if (!types.plain(grad.ptr()) || types.negative(grad.ptr())) return py::none();
      if (stateful && (!own || !PyDict_Check(own))) return py::none();
      Items item;
      item.of[kParams] = param;
      item.of[kGrads] = grad.ptr();
      for (int f = kState0; f < kFields; ++f) {
        PyObject* name = PyTuple_GET_ITEM(names.ptr(), f);
        if (name == Py_None) continue;
        PyObject* found = PyDict_GetItemWithError(own, name);
        if (PyErr_Occurred()) throw py::error_already_set();
        const bool needed = f <= kState2 || f == kSteps;  // small tensors have no scales
        if ((!found || found == Py_None) && needed) return py::none();
        if (found && !types.plain(found)) return py::none();
        item.of[f] = found;
        if (found) alive.push_back(py::reinterpret_borrow<py::object>(found));
      }
      if (!batch.add(set, item, uint32_t(first + i), false)) return py::none();
      const bool low = batch.tensors.back().param_type != kFloat32;
      if (low && PyTuple_GET_ITEM(names.ptr(), kMasters) != Py_None && !item.of[kMasters])
        return py::none();
      alive.push_back(std::move(grad));
      done.append(py::handle(param));
    }
  }
  batch.run(threads);
  return done;
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

// optim_squares(tensors, threads): each one's sum of squares, or None when one cannot be read.
py::object squares(py::list tensors, int threads) {
  std::vector<optim::Gradient> read;
  py::list odd, out;
  if (!read_gradients(tensors, read, odd)) return py::none();
  std::vector<double> sums(read.size());
  std::vector<float> largest(read.size());
  {
    py::gil_scoped_release no_gil;
    optim::kernels().measure(
        {read.data(), int64_t(read.size()), 1.0f, threads, sums.data(), largest.data()});
  }
  for (const double sum : sums) out.append(sum);
  return out;
}

// An address of float32 numbers, as Python has it of a tensor that it made for the purpose.
float* at(uintptr_t address) { return reinterpret_cast<float*>(address); }

// optim_factor_squares(grad, type, rows, cols, by_row, by_col, threads) and
// optim_factor_direction(..., floor, factor, out, threads), which returns the sum of squares: of
// addresses, for a gradient whose elements lie in order.
void factor_squares(uintptr_t grad, int type, int64_t rows, int64_t cols, uintptr_t by_row,
                    uintptr_t by_col, int threads) {
  py::gil_scoped_release no_gil;
  optim::kernels().factor_squares({rows, cols, at(grad), type, at(by_row), at(by_col), 0.0f, 1.0f,
                                   nullptr, threads});
}
double factor_direction(uintptr_t grad, int type, int64_t rows, int64_t cols, uintptr_t by_row,
                        uintptr_t by_col, float floor, float factor, uintptr_t out, int threads) {
  py::gil_scoped_release no_gil;
  return optim::kernels().factor_direction({rows, cols, at(grad), type, at(by_row), at(by_col),
                                            floor, factor, at(out), threads});
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
  m.def("optim_bind", &bind, py::arg("tensor"), py::arg("parameter"),
        "Gives the optimizers torch.Tensor and torch.nn.Parameter; once.");
  m.def("optim_step", &step, py::arg("kind"), py::arg("groups"), py::arg("threads"),
        "Updates all tensors, or returns the places of those that it cannot read.");
  m.def("optim_rows", &rows, py::arg("groups"), py::arg("device_type"), py::arg("device_id"),
        "The table of the CUDA kernels as bytes, or the places of tensors that they do not take.");
  m.def("optim_step_all", &step_all, py::arg("kind"), py::arg("groups"), py::arg("state"),
        py::arg("threads"), "Updates all parameters and returns them, or None: nothing was done.");
  m.def("optim_measure", &measure, py::arg("grads"), py::arg("threads"),
        "(sum of squares, largest magnitude), or the places of tensors that it cannot read.");
  m.def("optim_squares", &squares, py::arg("tensors"), py::arg("threads"),
        "Each tensor's sum of squares, or None when one cannot be read.");
  m.def("optim_factor_squares", &factor_squares, "Adafactor's sums of squares by row and column.");
  m.def("optim_factor_direction", &factor_direction, "Adafactor's direction and its squares' sum.");
  m.def("optim_scale", &scale, py::arg("grads"), py::arg("factor"), py::arg("threads"),
        "Multiplies in place, or returns the places of tensors that it cannot read.");
}

}  // namespace fastllm::bindings
