// masked_linear for CUDA tensors: the Device of ops/masked_linear.h. A small batch takes the kernels that never write theta or its
// gradient to memory; a large one the elementwise kernels around torch's GEMM.
#pragma once

#include "cuda/kernels/masked_linear.h"
#include "cuda/masked_weight.h"
#include "ops/masked_linear.h"

namespace metamask::cuda {

struct CudaLinear : Cuda {
  static at::Tensor linear(const at::Tensor& x, const at::Tensor& w, const at::Tensor& m, const at::Tensor& b, Gate gate) {
    const LinearCase given = case_of(x, w, m, gate);
    if (!fuses_masked_linear(given)) {
      const at::Tensor theta = MaskedWeight<Cuda>::forward(w, m, gate.kind, gate.param, x.scalar_type());
      return b.defined() ? at::addmm(b, x, theta.t()) : at::mm(x, theta.t());
    }
    at::Tensor y = at::empty({given.batch, given.out}, x.options());
    at::Tensor workspace = bytes(masked_linear_workspace(given), x);
    masked_linear(given, data("input", x), data("weight", w), data("mask_logits", m), data("bias", b), mutable_data("y", y),
                  mutable_data("workspace", workspace), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return y;
  }

  static at::Tensor linear_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& w, const at::Tensor& m, Gate gate,
                                    bool needs_dx, const Sink& dw, const Sink& dm) {
    const LinearCase given = case_of(x, w, m, gate);
    if (!fuses_masked_linear_backward(given)) return with_gemm(dy, x, w, m, gate, needs_dx, dw, dm);
    at::Tensor dx = needs_dx ? at::empty_like(x) : at::Tensor();
    if (!needs_dx && !dw.wanted() && !dm.wanted()) return dx;
    at::Tensor workspace = bytes(masked_linear_backward_workspace(given, needs_dx), x);
    masked_linear_backward(given, data("grad", dy), data("input", x), data("weight", w), data("mask_logits", m), dw, dm,
                           mutable_data("gradient of input", dx), mutable_data("workspace", workspace),
                           c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return dx;
  }

 private:
  static LinearCase case_of(const at::Tensor& x, const at::Tensor& w, const at::Tensor& m, Gate gate) {
    const bool tf32 = x.scalar_type() == at::kFloat && float32_as_tf32();
    return {gate, types_of(w, m), type_of(x.scalar_type()), tf32, x.size(0), w.size(0), w.size(1)};
  }

  // G = dy^T x. `widened`: it becomes the gradient of float32 logits, and is not rounded to 16 bits.
  static at::Tensor gradient_of_theta(const at::Tensor& dy, const at::Tensor& x, bool widened) {
    if (!widened || x.scalar_type() == at::kFloat) return at::mm(dy.t(), x);
    // Only on CUDA has torch a product of 16 bits with sums of float32 as its result.
    return x.is_cuda() ? at::mm(dy.t(), x, at::kFloat) : at::mm(dy.t().to(at::kFloat), x.to(at::kFloat));
  }

  static at::Tensor with_gemm(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& w, const at::Tensor& m, Gate gate,
                              bool needs_dx, const Sink& dw, const Sink& dm) {
    at::Tensor dx;
    // dx comes first: the sinks may change the parameters.
    if (needs_dx) dx = at::mm(dy, MaskedWeight<Cuda>::forward(w, m, gate.kind, gate.param, x.scalar_type()));
    if (dw.wanted() || dm.wanted()) {
      const at::Tensor g = gradient_of_theta(dy, x, m.scalar_type() != w.scalar_type());
      Cuda::backward(gate, types_of(w, m), type_of(g.scalar_type()), data("gradient of theta", g), data("weight", w),
                     data("mask_logits", m), dw, dm, w.numel());
    }
    return dx;
  }
};

}  // namespace metamask::cuda
