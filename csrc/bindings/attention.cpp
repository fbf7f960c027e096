// The attention family in Python.
#include "bindings/bind.h"
#include "cpu/isa.h"
#include "cpu/kernels/attention.h"

namespace fastllm::attention {
FASTLLM_DOT_LEVELS
}  // namespace fastllm::attention

namespace fastllm::bindings {
namespace {

using attention::Call;
using attention::Rows;

// A call's arguments lie in one array of 64-bit integers, in the order of the struct; numbers that
// are not integers are passed as they are.
struct Reader {
  const int64_t* at;
  int64_t next() { return *at++; }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(next());
  }
  Rows rows() {
    void* data = pointer<void>();
    const int64_t batch = next(), head = next(), row = next();
    return {data, batch, head, row};
  }
};

attention::Codes read_codes(Reader& in) {
  const int kind = int(in.next()), scale_type = int(in.next());
  const int64_t group = in.next(), groups = in.next();
  const Rows scales = in.rows();
  return {kind, scale_type, group, groups, scales, in.rows()};
}

Call read_call(Reader& in, double scale, double softcap, double dropout) {
  Call c{};
  c.dtype = int(in.next());
  for (int64_t* size : {&c.b, &c.h, &c.g, &c.t, &c.s, &c.d, &c.dv}) *size = in.next();
  for (Rows* rows : {&c.q, &c.k, &c.v, &c.out, &c.lse}) *rows = in.rows();
  c.q_starts = in.pointer<const int32_t>();
  c.k_starts = in.pointer<const int32_t>();
  c.lengths = in.pointer<const int32_t>();
  c.pages = in.pointer<const int32_t>();
  c.pages_row = in.next();
  c.page = in.next();
  c.mask_type = int(in.next());
  c.mask = in.pointer<const void>();
  for (int64_t* stride : {&c.mask_b, &c.mask_h, &c.mask_row, &c.mask_col}) *stride = in.next();
  c.slopes = in.pointer<const float>();
  c.slopes_b = in.next();
  c.sinks = in.pointer<const float>();
  for (int64_t* limit : {&c.left, &c.right, &c.diagonal}) *limit = in.next();
  c.bottom_right = in.next() != 0;
  c.seed = in.next();
  c.first_batch = in.next();
  c.threads = int(in.next());
  c.scale = scale;
  c.softcap = float(softcap);
  c.dropout = dropout;
  return c;
}

void attention_fwd(ptr packed, double scale, double softcap, double dropout) {
  Reader in{at<const int64_t>(packed)};
  attention::kernels().forward(read_call(in, scale, softcap, dropout));
}

void attention_codes(ptr packed, double scale, double softcap) {
  Reader in{at<const int64_t>(packed)};
  Call c = read_call(in, scale, softcap, 0.0);
  c.k_codes = read_codes(in);
  c.v_codes = read_codes(in);
  attention::kernels().forward(c);
}

void attention_bwd(ptr packed, double scale, double softcap, double dropout) {
  Reader in{at<const int64_t>(packed)};
  attention::Gradient grad{};
  grad.call = read_call(in, scale, softcap, dropout);
  for (Rows* rows : {&grad.grad_out, &grad.grad_lse, &grad.sink, &grad.dq, &grad.dk, &grad.dv})
    *rows = in.rows();
  grad.dmask = in.pointer<float>();
  for (int64_t* stride : {&grad.dmask_b, &grad.dmask_h, &grad.dmask_row}) *stride = in.next();
  grad.room = in.pointer<float>();
  attention::kernels().backward(grad);
}

}  // namespace

void bind_attention(py::module_& m) {
  def_kernel<attention_fwd>(m, "attention_fwd", "packed, scale, softcap, dropout");
  def_kernel<attention_codes>(m, "attention_codes", "packed, scale, softcap");
  def_kernel<attention_bwd>(m, "attention_bwd", "packed, scale, softcap, dropout");
  m.def("attention_bwd_room", [](ptr packed) {
    Reader in{at<const int64_t>(packed)};
    return attention::kernels().backward_room(read_call(in, 1.0, 0.0, 0.0));
  }, "Floats of memory that attention_bwd needs at the level in use.");
}

}  // namespace fastllm::bindings
