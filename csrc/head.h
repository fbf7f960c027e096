// What stands in front of every op: a call's number, and what was remembered for it.
#pragma once
#include <pybind11/pybind11.h>

namespace fastllm {

// Adds call_key and Head to the module.
void def_head(pybind11::module_& m);

}  // namespace fastllm
