// masked_linear for CUDA tensors, as the Device of csrc/masked_linear.h: the elementwise kernels around torch's GEMM.
#pragma once

#include "../masked_linear.h"

#include "masked_weight_torch.h"

namespace metamask::cuda {

struct CudaLinear : Cuda {
  static at::Tensor linear(const at::Tensor& x, const at::Tensor& w, const at::Tensor& m, const at::Tensor& b, Gate gate) {
    const at::Tensor theta = MaskedWeight<Cuda>::forward(w, m, gate.kind, gate.parameter, x.scalar_type());
    return b.defined() ? at::addmm(b, x, theta.t()) : at::mm(x, theta.t());
  }

  static at::Tensor linear_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& w, const at::Tensor& m, Gate gate,
                                    bool needs_dx, const Sink& dw, const Sink& dm) {
    at::Tensor dx;
    // Before the sinks change the parameters.
    if (needs_dx) dx = at::mm(dy, MaskedWeight<Cuda>::forward(w, m, gate.kind, gate.parameter, x.scalar_type()));
    if (dw.wanted() || dm.wanted()) {
      const at::Tensor g = at::mm(dy.t(), x);
      Cuda::backward(gate, type_of(w.scalar_type()), type_of(g.scalar_type()), g.const_data_ptr(), w.const_data_ptr(),
                     m.const_data_ptr(), dw, dm, w.numel());
    }
    return dx;
  }
};

}  // namespace metamask::cuda
