// The arithmetic peak in Python.
#include "cpu/kernels/peak.h"

#include "bindings/bind.h"
#include "cpu/isa.h"

namespace fastllm::peak {
FASTLLM_DOT_LEVELS
}  // namespace fastllm::peak

namespace fastllm::bindings {

void bind_peak(py::module_& m) {
  m.def(
      "peak",
      [](int dtype, int64_t rounds, int threads) {
        return peak::kernels().run(dtype, rounds, threads);
      },
      py::arg("dtype"), py::arg("rounds"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>(),
      "Multiply-adds on registers alone, `rounds` a thread: how many operations that were.");
}

}  // namespace fastllm::bindings
