// masked_linear for CUDA tensors: the elementwise kernels around torch's GEMM.
#include "../masked_linear.h"

#include "masked_weight_torch.h"

namespace metamask::cuda {
namespace {

struct CudaLinear : Cuda {
  static at::Tensor linear(const at::Tensor& x, const at::Tensor& w, const at::Tensor& m, const at::Tensor& b, Gate gate) {
    const at::Tensor theta = MaskedWeight<Cuda>::forward(w, m, gate.kind, gate.parameter, x.scalar_type());
    return b.defined() ? at::addmm(b, x, theta.t()) : at::mm(x, theta.t());
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(const at::Tensor& dy, const at::Tensor& x,
                                                                        const at::Tensor& w, const at::Tensor& m, Gate gate,
                                                                        std::array<bool, 3> needs) {
    at::Tensor dx, dw, dm;
    if (needs[0]) dx = at::mm(dy, MaskedWeight<Cuda>::forward(w, m, gate.kind, gate.parameter, x.scalar_type()));
    if (needs[1] || needs[2]) {
      std::tie(dw, dm) = MaskedWeight<Cuda>::backward(at::mm(dy.t(), x), w, m, gate.kind, gate.parameter, {needs[1], needs[2]});
    }
    return {dx, dw, dm};
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(metamask, CUDA, library) { MaskedLinear<CudaLinear>::register_in(library); }

}  // namespace metamask::cuda
