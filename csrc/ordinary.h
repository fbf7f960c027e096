// What an ordinary call is, and how C code reads, allocates and runs for one.
#pragma once
#include <pybind11/pybind11.h>

#include <new>

#include "cpu/types.h"
#include "dlpack_exchange.h"

namespace fastllm {

constexpr int64_t kSmall = 32 << 10;  // bytes below which threads and the GIL are left alone

// ---- what it is: all of it says no before bind_torch was called

// No dispatch or function mode, transform, autocast, tracing, forward-mode AD, forced backend.
bool nothing_special();
// A tensor, or of a class derived from it.
bool is_any_tensor(PyObject* object);
// A tensor of torch's own class whose bytes are its values: no lazy negation.
bool is_plain(PyObject* object);
// A plain tensor's sizes and memory, borrowed.
bool view_of(PyObject* object, dlpack::Tensor& view);
// What a tensor's method without arguments, or attribute, answers; null with a Python error set.
PyObject* ask_method(PyObject* method, PyObject* tensor);
PyObject* ask_attribute(PyObject* descriptor, PyObject* tensor);
bool wants_grad(PyObject* object);
bool grad_enabled();
// Whether algorithms must be deterministic.
bool deterministic();
int thread_count();

// ---- what is done in one

// A contiguous CPU tensor of a dtype that the kernels take.
struct View {
  dlpack::Tensor t{};
  int dtype = kFloat32;
  int64_t numel = 1;

  bool read(PyObject* object);
  bool read_any(PyObject* object);  // of any dtype; `dtype` does not say which
  bool contiguous();  // and sets numel
  void* data() const { return static_cast<char*>(t.data) + t.byte_offset; }
  int64_t bytes() const { return numel * (dtype == kFloat32 ? 4 : 2); }
  bool same_as(const View& o) const;
};

inline int threads_for(int64_t bytes) { return bytes < kSmall ? 1 : thread_count(); }

// A new tensor like `object`, and where its memory is. Null with a Python error set.
PyObject* allocate_like(PyObject* object, int64_t bytes, void*& data);

// A new contiguous tensor of `dims` sizes, its dtype and device `object`'s, and where its memory is.
PyObject* allocate_shape(PyObject* object, const int64_t* sizes, int dims, void*& data);

// Runs a kernel, without the GIL when that pays. False with a Python error set.
template <class Arguments>
bool launch(void (*kernel)(const Arguments&), const Arguments& arguments, int64_t bytes) {
  bool enough_memory = true;
  PyThreadState* state = bytes < kSmall ? nullptr : PyEval_SaveThread();
  try {
    kernel(arguments);
  } catch (const std::bad_alloc&) {
    enough_memory = false;
  }
  if (state) PyEval_RestoreThread(state);
  return enough_memory || (PyErr_NoMemory(), false);
}

// Adds bind_torch to the module.
void def_ordinary(pybind11::module_& m);

}  // namespace fastllm
