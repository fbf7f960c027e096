// fastllm._C: the kernels of each family (bindings/), the level in use, the output pool.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "bindings/bind.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/pool.h"
#include "fast_call.h"
#include "head.h"
#include "ordinary.h"

namespace py = pybind11;

namespace {

// Runs when the capsule dies: a consumer that took the tensor over has renamed it.
void drop_capsule(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, "dltensor"))
    fastllm::pool_return(
        static_cast<fastllm::LentTensor*>(PyCapsule_GetPointer(capsule, "dltensor")));
}

py::object pool_empty_tensor(int type_code, int bits, const std::vector<int64_t>& shape) {
  fastllm::LentTensor* tensor;
  {
    py::gil_scoped_release no_gil;
    tensor = fastllm::pool_lend(type_code, bits, shape.data(), int(shape.size()));
  }
  PyObject* capsule = PyCapsule_New(tensor, "dltensor", drop_capsule);
  if (!capsule) {
    fastllm::pool_return(tensor);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(capsule);
}

py::dict pool_stats() {
  const fastllm::PoolStats s = fastllm::pool_stats();
  py::dict out;
  out["limit"] = s.limit;
  out["idle_bytes"] = s.idle_bytes;
  out["idle_blocks"] = s.idle_blocks;
  out["live_bytes"] = s.live_bytes;
  out["live_blocks"] = s.live_blocks;
  out["reused"] = s.reused;
  out["allocated"] = s.allocated;
  return out;
}

}  // namespace

#ifndef FASTLLM_SOURCES
#define FASTLLM_SOURCES
#endif
#define TEXT_OF(...) #__VA_ARGS__
#define TEXT(...) TEXT_OF(__VA_ARGS__)

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU kernels on raw pointers; dtype codes: 0 float32, 1 bfloat16, 2 float16.";
  fastllm::guard_fork();
  fastllm::init_isa();
  fastllm::def_ordinary(m);
  fastllm::def_fast_calls(m);
  fastllm::def_fast_quant(m);
  fastllm::def_head(m);
  m.attr("sources") = TEXT(FASTLLM_SOURCES);  // "norm:hash,...": what the kernels were built from

  fastllm::bindings::bind_gemm(m);
  fastllm::bindings::bind_norm(m);
  fastllm::bindings::bind_activation(m);
  fastllm::bindings::bind_optim(m);
  fastllm::bindings::bind_loss(m);
  fastllm::bindings::bind_softmax(m);
  fastllm::bindings::bind_dropout(m);
  fastllm::bindings::bind_embedding(m);
  fastllm::bindings::bind_quant(m);
  fastllm::bindings::bind_rotary(m);
  fastllm::bindings::bind_attention(m);
  fastllm::bindings::bind_qgemm(m);
  fastllm::bindings::bind_sparse(m);
  fastllm::bindings::bind_peak(m);

  m.def("isa", &fastllm::isa, "The level of the kernels in use.");
  m.def("isa_levels", &fastllm::isa_levels, "The levels that this machine can run, best last.");
  m.def("set_isa", &fastllm::set_isa, py::arg("name"), "Use another level from now on.");

  using no_gil = py::call_guard<py::gil_scoped_release>;
  m.def("pool_empty_tensor", &pool_empty_tensor, py::arg("type_code"), py::arg("bits"),
        py::arg("shape"), "A DLPack capsule of a new tensor whose memory comes from the pool.");
  m.def("pool_set_limit", &fastllm::pool_set_limit, py::arg("bytes"), no_gil(),
        "How many bytes may lie idle.");
  m.def("pool_empty", &fastllm::pool_empty, no_gil(), "Frees all idle blocks.");
  m.def("pool_stats", &pool_stats, "Counters of the pool.");
}
