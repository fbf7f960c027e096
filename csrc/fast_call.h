#pragma once
#include <pybind11/pybind11.h>

namespace fastllm {

// Adds the fast_* functions to the module.
void def_fast_calls(pybind11::module_& m);
// fast_quant_linear.
void def_fast_quant(pybind11::module_& m);

}  // namespace fastllm
