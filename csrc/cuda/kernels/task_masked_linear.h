// Launchers of task_masked_linear and its derivatives, on raw device pointers to contiguous arrays: x, dx [rows, groups * in], y,
// dy [rows, out], w [out, in], masks [out, in] for each task, bias [out], with rows = samples * rows_per_sample. w and the
// bias are of type `types.weight`, the masks of `types.mask`, those of the bias of `bias_mask`, x, y, dx and dy of `product`.
#pragma once

#include "cuda/kernels/segments.h"

namespace metamask::cuda {

struct TaskLinearCase {
  Gate gate;
  ParamTypes types;
  Type bias_mask, product;
  bool tf32;  // whether float32 products may use tensor cores
  int64_t groups, out, in;
  SortedRows sorted;
};

// There are kernels for weights and products of one type, and for float32 weights with products of 16 bits.
constexpr bool has_task_kernel(Type weight, Type product) {
  return weight == product || (weight == Type::kFloat32 && product != Type::kFloat64);
}

struct TaskParameters {
  const void* w;
  PerTask masks;
  const void* bias = nullptr;  // null: none
  PerTask bias_masks = {};     // none: the bias is not masked
};

// The cotangents along which the first derivatives are differentiated: of dx, dw and the masks' gradients; null: zero.
struct TaskCotangents {
  const void* dx = nullptr;
  const void* dw = nullptr;
  PerTask masks = {};
};

// Return the bytes of the workspaces of the launchers; for 0 the pointer may be null.
int64_t task_masked_linear_workspace(const TaskLinearCase& given);
int64_t task_masked_linear_backward_workspace(const TaskLinearCase& given, bool needs_dx);

void task_masked_linear(const TaskLinearCase& given, const TaskParameters& parameters, const void* x, void* y, void* workspace,
                        cudaStream_t stream);

// dw is in the type of the arithmetic (float, or double), dm of type `types.mask`. What is null is not wanted.
void task_masked_linear_backward(const TaskLinearCase& given, const TaskParameters& parameters, const void* dy, const void* x,
                                 void* dw, const PerTask& dm, void* dx, void* workspace, cudaStream_t stream);

// The second derivatives, for float64 and exact float32. ddy: the gradient for dy, but without what the bias gives.
void task_masked_linear_double_forward(const TaskLinearCase& given, const TaskParameters& parameters,
                                       const TaskCotangents& cotangents, const void* x, void* ddy, void* workspace,
                                       cudaStream_t stream);
void task_masked_linear_double_backward(const TaskLinearCase& given, const TaskParameters& parameters,
                                        const TaskCotangents& cotangents, const void* dy, const void* x, void* dw,
                                        const PerTask& dm, void* dx, void* workspace, cudaStream_t stream);

}  // namespace metamask::cuda
