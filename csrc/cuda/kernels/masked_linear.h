// Launchers of masked_linear and its gradients for small batches, on raw device pointers to contiguous arrays: x, dx [batch, in],
// y, dy, [batch, out], w, m [out, in], bias [out]. w and m, and what their sinks point to, are of `types`, the rest of type
// `product`.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/types.h"

namespace metamask::cuda {

struct LinearCase {
  Gate gate;
  ParamTypes types;
  Type product;
  bool tf32;  // whether float32 products may use tensor cores
  int64_t batch, out, in;
};

// Return whether there is a kernel for the types, and the batch is small enough that theta in registers beats theta in memory and a
// GEMM. (The batch sizes come from counting operations, not from measurements: docs/internals/cuda.md.)
bool fuses_masked_linear(const LinearCase& given);
bool fuses_masked_linear_backward(const LinearCase& given);

// Return the bytes of the workspace that the launcher takes; for 0 the pointer may be null.
int64_t masked_linear_workspace(const LinearCase& given);
int64_t masked_linear_backward_workspace(const LinearCase& given, bool needs_dx);

void masked_linear(const LinearCase& given, const void* x, const void* w, const void* m, const void* bias, void* y, void* workspace,
                   cudaStream_t stream);

// A null dx is not wanted.
void masked_linear_backward(const LinearCase& given, const void* dy, const void* x, const void* w, const void* m, Sink dw, Sink dm,
                            void* dx, void* workspace, cudaStream_t stream);

}  // namespace metamask::cuda
