// masked_linear through torch's BLAS, for batches over which panels would pass too often (cpu/products.h says which): theta lies in
// memory whole, its gradient likewise, and both are multiplied as any matrix; what the gate does to them is one pass over W and M.
#include "cpu/panels.h"

namespace metamask::cpu {
namespace {

struct BlasLinear {
  const at::Tensor w, m;
  const Gate gate;
  const at::ScalarType type;  // of the product
  const ParamTypes types = types_of(w, m);
  const void *weight = data("weight", w), *mask = data("mask_logits", m);
  const at::AutoDispatchBelowADInplaceOrView below = {};

  at::Tensor empty(int64_t rows, int64_t columns) const { return at::empty({rows, columns}, w.options().dtype(type)); }

  at::Tensor theta() const {
    const at::Tensor theta = empty(w.size(0), w.size(1));
    Cpu::forward(gate, types, type_of(type), weight, mask, mutable_data("theta", theta), w.numel());
    return theta;
  }

  at::Tensor forward(const at::Tensor& input, const at::Tensor& bias) const {
    const at::Tensor x = input.to(type), columns = theta().t();
    return bias.defined() ? at::addmm(bias.to(type), x, columns) : at::mm(x, columns);
  }

  // Returns dx, if it is wanted.
  at::Tensor backward(const at::Tensor& grad, const at::Tensor& input, bool needs_dx, const Sink& dw, const Sink& dm) const {
    const at::Tensor dy = grad.to(type);
    if (!dw.wanted() && !dm.wanted()) return needs_dx ? at::mm(dy, theta()) : at::Tensor();
    const at::Tensor g = at::mm(dy.t(), input.to(type)), theta = needs_dx ? empty(w.size(0), w.size(1)) : at::Tensor();
    Cpu::backward(gate, types, type_of(type), data("g", g), weight, mask, dw, dm, w.numel(), mutable_data("theta", theta));
    return needs_dx ? at::mm(dy, theta) : at::Tensor();
  }
};

}  // namespace

at::Tensor linear_blas(const at::Tensor& x, const at::Tensor& w, const at::Tensor& m, const at::Tensor& b, Gate gate,
                       at::ScalarType type) {
  return BlasLinear{w, m, gate, type}.forward(x, b);
}

at::Tensor linear_backward_blas(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& w, const at::Tensor& m, Gate gate,
                                at::ScalarType type, bool needs_dx, const Sink& dw, const Sink& dm) {
  return BlasLinear{w, m, gate, type}.backward(dy, x, needs_dx, dw, dm);
}

}  // namespace metamask::cpu
