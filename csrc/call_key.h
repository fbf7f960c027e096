#pragma once
#include <pybind11/pybind11.h>

namespace fastllm {

// Adds bind_call_key and call_key to the module.
void def_call_key(pybind11::module_& m);

}  // namespace fastllm
