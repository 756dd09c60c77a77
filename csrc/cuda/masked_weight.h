// masked_weight for CUDA tensors: device and stream, and the Device of ops/masked_weight.h. The launchers are in
// cuda/kernels/masked_weight.cu.
#pragma once

#include <ATen/Context.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/kernels/masked_weight.h"
#include "ops/masked_weight.h"
#include "ops/masked_weight_list.h"

namespace metamask::cuda {

// Allocates a workspace; undefined if none is needed.
inline at::Tensor bytes(int64_t count, const at::Tensor& like) {
  return count > 0 ? at::empty({count}, like.options().dtype(at::kByte)) : at::Tensor();
}

// Returns whether torch's own products of float32 on CUDA would round to tf32, whichever of its two settings says so
// (allowTF32CuBLAS() raises once the newer one has been used).
inline bool float32_as_tf32() {
  const auto precision = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  return precision == at::Float32Precision::TF32 && !at::NoTF32Guard::should_disable_tf32();
}

struct Cuda {
  struct Guard : c10::cuda::CUDAGuard {
    explicit Guard(const at::Tensor& tensor) : CUDAGuard(tensor.device()) {}
  };

  static at::Tensor gradient_like(const at::Tensor& parameter) { return at::empty_like(parameter); }

  static void forward(Gate gate, ParamTypes types, Type out, const void* w, const void* m, void* theta, int64_t n) {
    masked_weight(gate, types, out, w, m, theta, n, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  static void backward(Gate gate, ParamTypes types, Type grad, const void* g, const void* w, const void* m, const Sink& dw,
                       const Sink& dm, int64_t n) {
    masked_weight_backward(gate, types, grad, g, w, m, dw, dm, n, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  static void double_backward(Gate gate, ParamTypes types, Type grad, const void* a, const void* b, const void* g, const void* w,
                              const void* m, void* dg, void* dw, void* dm, int64_t n) {
    masked_weight_double_backward(gate, types, grad, a, b, g, w, m, dg, dw, dm, n, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  static void forward_list(Gate gate, ParamTypes types, Type out, const std::vector<ForwardArrays>& list) {
    masked_weight_list(gate, types, out, list, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  static void backward_list(Gate gate, ParamTypes types, Type grad, const std::vector<BackwardArrays>& list) {
    masked_weight_list_backward(gate, types, grad, list, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  static void double_backward_list(Gate gate, ParamTypes types, Type grad, const std::vector<DoubleBackwardArrays>& list) {
    masked_weight_list_double_backward(gate, types, grad, list, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace metamask::cuda
