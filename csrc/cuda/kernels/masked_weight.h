// Launchers of masked_weight and its derivatives, on raw device pointers to `n` elements in one order. `types` are those of weight
// and mask, and of their gradients; float64 goes with float64 only. A null cotangent is zero, a null output is not computed.
// Each parameter's gradient goes to a Sink.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "core/types.h"

namespace metamask::cuda {

void masked_weight(Gate gate, ParamTypes types, Type out, const void* w, const void* m, void* theta, int64_t n,
                   cudaStream_t stream);

void masked_weight_backward(Gate gate, ParamTypes types, Type grad, const void* g, const void* w, const void* m, Sink dw, Sink dm,
                            int64_t n, cudaStream_t stream);

void masked_weight_double_backward(Gate gate, ParamTypes types, Type grad, const void* a, const void* b, const void* g,
                                   const void* w, const void* m, void* dg, void* dw, void* dm, int64_t n, cudaStream_t stream);

// The same for lists: one launch for as many weights as have room in a kernel's arguments (ListPart), another for the next.
void masked_weight_list(Gate gate, ParamTypes types, Type out, const std::vector<ForwardArrays>& list, cudaStream_t stream);

void masked_weight_list_backward(Gate gate, ParamTypes types, Type grad, const std::vector<BackwardArrays>& list,
                                 cudaStream_t stream);

void masked_weight_list_double_backward(Gate gate, ParamTypes types, Type grad, const std::vector<DoubleBackwardArrays>& list,
                                        cudaStream_t stream);

}  // namespace metamask::cuda
