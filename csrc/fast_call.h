// The shortest way from Python tensors to Python tensors, for ordinary calls.
#pragma once
#include <pybind11/pybind11.h>

namespace fastllm {

// Adds bind_torch and the fast_* functions to the module.
void def_fast_calls(pybind11::module_& m);

}  // namespace fastllm
