// The shortest way from Python tensors to Python tensors, for ordinary calls.
#pragma once
#include <pybind11/pybind11.h>

#include "dlpack_exchange.h"

namespace fastllm {

// ---- what the ordinary call is: all of it says no before bind_torch was called

// No dispatch or function mode, transform, autocast, tracing, forward-mode AD, forced backend.
bool nothing_special();
// A tensor, or of a class derived from it.
bool is_any_tensor(PyObject* object);
// A tensor of torch's own class whose bytes are its values: no lazy negation.
bool is_plain(PyObject* object);
// A plain tensor's sizes and memory, borrowed.
bool view_of(PyObject* object, dlpack::Tensor& view);
bool wants_grad(PyObject* object);
bool grad_enabled();
int thread_count();

// Adds bind_torch and the fast_* functions to the module.
void def_fast_calls(pybind11::module_& m);

}  // namespace fastllm
