// A call as one number (what an op is asked with), and what is remembered for it: the function of
// the chosen backend. The same in Python costs more than a microsecond a call; here, most of what
// is left is asking torch whether anything watches or transforms the call.
//
// Head(look): calling it runs an ordinary call, or answers NotImplemented. A number not seen before
// goes to look(key, args), which answers None (no ordinary call after all) or
//   (found, call, first, otherwise)
// found is what find() answers. The call runs as call(*args), or call(first, *args) unless first is
// None; where that answers None and otherwise is not None, as otherwise(*args).
#include "head.h"

#include <cstring>
#include <unordered_map>

#include "ordinary.h"

namespace py = pybind11;

namespace fastllm {
namespace {

constexpr Py_ssize_t kMost = 32;  // arguments

// ---- the number

// splitmix64: every bit of `value` reaches every bit of the state
void mix(uint64_t& state, uint64_t value) {
  state += value + 0x9e3779b97f4a7c15u;
  state = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9u;
  state = (state ^ (state >> 27)) * 0x94d049bb133111ebu;
  state ^= state >> 31;
}

bool mix_tensor(uint64_t& state, PyObject* object) {
  View view;
  dlpack::Tensor& t = view.t;
  if (!view_of(object, t)) return false;
  mix(state, uint64_t(t.dtype.code) << 8 | t.dtype.bits);
  mix(state, uint64_t(t.device.type) << 32 | uint32_t(t.device.id));
  for (int d = 0; d < t.ndim; ++d) mix(state, uint64_t(t.shape[d]));
  // how it is not contiguous matters, too: a transposed matrix is not an expanded one
  const bool contiguous = view.contiguous();
  for (int d = 0; !contiguous && d < t.ndim; ++d) mix(state, uint64_t(t.strides[d]));
  mix(state, uint64_t(t.ndim));
  return true;
}

// An argument that is no tensor. By value where the hash is not: -1 and -2 have the same.
bool mix_value(uint64_t& state, PyObject* value) {
  if (PyTuple_CheckExact(value)) {
    const Py_ssize_t size = PyTuple_GET_SIZE(value);
    mix(state, uint64_t(size));
    for (Py_ssize_t i = 0; i < size; ++i)
      if (!mix_value(state, PyTuple_GET_ITEM(value, i))) return false;
    return true;
  }
  if (PyFloat_CheckExact(value)) {
    const double number = PyFloat_AS_DOUBLE(value);
    uint64_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    mix(state, bits);
    return true;
  }
  const bool integer = PyLong_CheckExact(value);
  const int64_t number = integer ? PyLong_AsLongLong(value) : PyObject_Hash(value);
  if (number == -1 && PyErr_Occurred()) return PyErr_Clear(), false;
  mix(state, uint64_t(number));
  return true;
}

// False: no ordinary call. `training` None asks the tensors and the grad mode, and declines what is
// watched. The lowest bit of `key` says which direction was found.
bool key_of(PyObject* args, PyObject* training, uint64_t& key) {
  const bool ask = training == Py_None;
  if (ask && !nothing_special()) return false;
  uint64_t state = 0;
  bool grad = training == Py_True;
  const Py_ssize_t size = PyTuple_GET_SIZE(args);
  const bool recording = ask && grad_enabled();
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* value = PyTuple_GET_ITEM(args, i);
    if (is_any_tensor(value)) {  // no subclass, nothing traced
      if (!is_plain(value) || !mix_tensor(state, value)) return false;
      grad = grad || (recording && wants_grad(value));
    } else if (!mix_value(state, value)) {
      return false;
    }
  }
  mix(state, uint64_t(thread_count()) << 2 | uint64_t(deterministic()) << 1 | grad);
  key = (state & ~uint64_t(1)) | grad;
  return true;
}

bool arguments_of(PyObject* const* given, Py_ssize_t count, const char* what) {
  if (count >= 1 && count <= 2 && PyTuple_Check(given[0])) return true;
  PyErr_Format(PyExc_TypeError, "%s: expected a tuple and True, False or None", what);
  return false;
}

PyObject* call_key(PyObject*, PyObject* const* given, Py_ssize_t count) {
  uint64_t key;
  if (!arguments_of(given, count, "call_key")) return nullptr;
  if (!key_of(given[0], count == 2 ? given[1] : Py_None, key)) Py_RETURN_NONE;
  return PyLong_FromUnsignedLongLong(key);
}

// ---- what is remembered for it

using Known = std::unordered_map<uint64_t, PyObject*>;  // look()'s answers: tuples of four

struct Head {
  PyObject_HEAD
  PyObject* look;
  Known* known;
};

Head* head_of(PyObject* self) { return reinterpret_cast<Head*>(self); }

PyObject* head_new(PyTypeObject* type, PyObject*, PyObject*) {
  PyObject* self = type->tp_alloc(type, 0);
  if (self) head_of(self)->known = new Known;
  return self;
}

int head_init(PyObject* self, PyObject* args, PyObject*) {
  PyObject* look;
  if (!PyArg_ParseTuple(args, "O", &look)) return -1;
  Py_XSETREF(head_of(self)->look, Py_NewRef(look));
  return 0;
}

int head_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(head_of(self)->look);
  if (head_of(self)->known)
    for (const auto& entry : *head_of(self)->known) Py_VISIT(entry.second);
  return 0;
}

void forget(Head* head) {
  Known old;  // emptied first: what dies may call again
  if (head->known) old.swap(*head->known);
  for (const auto& entry : old) Py_DECREF(entry.second);
}

int head_clear(PyObject* self) {
  Py_CLEAR(head_of(self)->look);
  forget(head_of(self));
  return 0;
}

void head_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  head_clear(self);
  delete head_of(self)->known;
  type->tp_free(self);
  Py_DECREF(type);
}

// A new reference to what is known of a call, or None; null with a Python error set.
PyObject* known_of(Head* head, PyObject* args, PyObject* training) {
  uint64_t key;
  if (!key_of(args, training, key)) return Py_NewRef(Py_None);
  const auto at = head->known->find(key);
  if (at != head->known->end()) return Py_NewRef(at->second);
  PyObject* number = PyLong_FromUnsignedLongLong(key);
  if (!number || !head->look) return Py_XDECREF(number), nullptr;
  PyObject* found = PyObject_CallFunctionObjArgs(head->look, number, args, nullptr);
  Py_DECREF(number);
  if (!found || found == Py_None) return found;
  if (!PyTuple_CheckExact(found) || PyTuple_GET_SIZE(found) != 4) {
    Py_DECREF(found);
    return PyErr_Format(PyExc_TypeError, "look: expected a tuple of four or None");
  }
  PyObject*& place = (*head->known)[key];
  Py_XSETREF(place, Py_NewRef(found));
  return found;
}

PyObject* run_known(PyObject* known, PyObject* args) {
  PyObject* call = PyTuple_GET_ITEM(known, 1);
  PyObject* first = PyTuple_GET_ITEM(known, 2);
  PyObject* otherwise = PyTuple_GET_ITEM(known, 3);
  const Py_ssize_t size = PyTuple_GET_SIZE(args);
  PyObject* given[kMost + 2];  // one more in front, as vectorcall likes it
  given[1] = first;
  for (Py_ssize_t i = 0; i < size; ++i) given[i + 2] = PyTuple_GET_ITEM(args, i);
  const bool with_first = first != Py_None;
  PyObject* out = PyObject_Vectorcall(call, given + 2 - with_first,
                                      size_t(size + with_first) | PY_VECTORCALL_ARGUMENTS_OFFSET,
                                      nullptr);
  if (out != Py_None || otherwise == Py_None) return out;
  Py_DECREF(out);
  return PyObject_Vectorcall(otherwise, given + 2, size_t(size) | PY_VECTORCALL_ARGUMENTS_OFFSET,
                             nullptr);
}

PyObject* head_call(PyObject* self, PyObject* args, PyObject* kwargs) {
  if (kwargs && PyDict_GET_SIZE(kwargs))
    return PyErr_Format(PyExc_TypeError, "expected no keyword arguments");
  if (PyTuple_GET_SIZE(args) > kMost) return Py_NewRef(Py_NotImplemented);
  PyObject* known = known_of(head_of(self), args, Py_None);
  if (!known) return nullptr;
  PyObject* out = known == Py_None ? Py_NewRef(Py_NotImplemented) : run_known(known, args);
  Py_DECREF(known);
  return out;
}

PyObject* head_find(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  if (!arguments_of(given, count, "find")) return nullptr;
  PyObject* known = known_of(head_of(self), given[0], count == 2 ? given[1] : Py_None);
  if (!known || known == Py_None) return known;
  PyObject* found = Py_NewRef(PyTuple_GET_ITEM(known, 0));
  Py_DECREF(known);
  return found;
}

PyObject* head_forget(PyObject* self, PyObject*) {
  forget(head_of(self));
  Py_RETURN_NONE;
}

Py_ssize_t head_length(PyObject* self) { return Py_ssize_t(head_of(self)->known->size()); }

template <class F>
PyCFunction as_method(F* f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyObject* head_type() {
  static PyMethodDef methods[] = {
      {"find", as_method(&head_find), METH_FASTCALL,
       "find(args, training=None): what look found for these arguments, or None."},
      {"forget", head_forget, METH_NOARGS, "Asks look again about every call."},
      {}};
  static PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(&head_new)},
                                {Py_tp_init, reinterpret_cast<void*>(&head_init)},
                                {Py_tp_traverse, reinterpret_cast<void*>(&head_traverse)},
                                {Py_tp_clear, reinterpret_cast<void*>(&head_clear)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(&head_dealloc)},
                                {Py_tp_call, reinterpret_cast<void*>(&head_call)},
                                {Py_mp_length, reinterpret_cast<void*>(&head_length)},
                                {Py_tp_methods, methods},
                                {Py_tp_doc, const_cast<char*>("Runs an op's ordinary calls.")},
                                {}};
  static PyType_Spec spec{"fastllm._C.Head", sizeof(Head), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, slots};
  return PyType_FromSpec(&spec);
}

}  // namespace

void def_head(py::module_& m) {
  static PyMethodDef method{
      "call_key", as_method(&call_key), METH_FASTCALL,
      "call_key(args, training=None): a call's arguments as a number, odd when gradients are "
      "wanted; None: no ordinary call."};
  m.attr("call_key") = py::reinterpret_steal<py::object>(PyCFunction_NewEx(&method, nullptr, nullptr));
  m.attr("Head") = py::reinterpret_steal<py::object>(head_type());
}

}  // namespace fastllm
