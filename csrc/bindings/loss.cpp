// The losses in Python.
#include "bindings/bind.h"
#include "cpu/isa.h"
#include "cpu/kernels/loss.h"

namespace fastllm::loss {
FASTLLM_DOT_LEVELS
}  // namespace fastllm::loss

namespace fastllm::bindings {
namespace {

void cross_entropy_fwd(int dtype, ptr input, ptr target, ptr probs, ptr weight, ptr loss,
                       ptr losses, ptr lse, ptr grad_input, double upstream, int64_t rows,
                       int64_t cols, bool part, int64_t first, int64_t classes, int64_t ignore_index,
                       int reduction, float smoothing, float z_loss, float softcap, float scale,
                       int threads) {
  loss::kernels().cross_entropy_fwd(
      {{dtype, at(input), at<const int64_t>(target), at(probs), at<const float>(weight), rows, cols,
        part, first, classes, ignore_index, reduction, smoothing, z_loss, {scale, softcap}, threads},
       at(loss), at<double>(losses), at<double>(lse), at(grad_input), upstream});
}

void cross_entropy_bwd(int dtype, ptr input, ptr target, ptr probs, ptr weight, ptr lse,
                       ptr grad_loss, ptr grad_input, ptr grad_probs, int64_t rows, int64_t cols,
                       bool part, int64_t first, int64_t classes, int64_t ignore_index, int reduction,
                       float smoothing, float z_loss, float softcap, float scale, int threads) {
  loss::kernels().cross_entropy_bwd(
      {{dtype, at(input), at<const int64_t>(target), at(probs), at<const float>(weight), rows, cols,
        part, first, classes, ignore_index, reduction, smoothing, z_loss, {scale, softcap}, threads},
       at<const double>(lse), at<const float>(grad_loss), at(grad_input), at(grad_probs)});
}

void distill_fwd(int dtype, ptr student, ptr teacher, ptr loss, ptr stats, int64_t rows,
                 int64_t cols, float inverse_temperature, int divergence, int threads) {
  loss::kernels().distill_fwd({{dtype, at(student), at(teacher), rows, cols, inverse_temperature,
                                divergence, threads},
                               at<float>(loss), at<double>(stats)});
}

void distill_bwd(int dtype, ptr student, ptr teacher, ptr stats, ptr grad_loss, ptr grad_student,
                 int64_t rows, int64_t cols, float inverse_temperature, int divergence,
                 int threads) {
  loss::kernels().distill_bwd({{dtype, at(student), at(teacher), rows, cols, inverse_temperature,
                                divergence, threads},
                               at<const double>(stats), at<const float>(grad_loss),
                               at(grad_student)});
}

// The first row whose target is neither ignored nor in [0, classes); -1 if there is none.
int64_t first_bad_target(ptr target, int64_t rows, int64_t classes, int64_t ignore_index) {
  const int64_t* t = at<const int64_t>(target);
  for (int64_t i = 0; i < rows; ++i)
    if (t[i] != ignore_index && (t[i] < 0 || t[i] >= classes)) return i;
  return -1;
}

}  // namespace

void bind_loss(py::module_& m) {
  def_kernel<cross_entropy_fwd>(m, "cross_entropy_fwd",
                                "dtype, input, target, probs, weight, loss, losses, lse, "
                                "grad_input, upstream, rows, cols, part, first, classes, ignore_index, "
                                "reduction, smoothing, z_loss, softcap, scale, threads");
  def_kernel<cross_entropy_bwd>(m, "cross_entropy_bwd",
                                "dtype, input, target, probs, weight, lse, grad_loss, grad_input, "
                                "grad_probs, rows, cols, part, first, classes, ignore_index, "
                                "reduction, smoothing, z_loss, softcap, scale, threads");
  def_kernel<distill_fwd>(m, "distill_fwd",
                          "dtype, student, teacher, loss, stats, rows, cols, inverse_temperature, "
                          "divergence, threads");
  def_kernel<distill_bwd>(m, "distill_bwd",
                          "dtype, student, teacher, stats, grad_loss, grad_student, rows, cols, "
                          "inverse_temperature, divergence, threads");
  m.def("first_bad_target", &first_bad_target,
        "(target, rows, classes, ignore_index): the first row with a target out of range, or -1.");
}

}  // namespace fastllm::bindings
