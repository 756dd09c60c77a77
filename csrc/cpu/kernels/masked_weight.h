// The loops of masked_weight and its derivatives, one table for each instruction set.
#pragma once

#include <cstdint>

#include "cpu/kernels/isa.h"
#include "cpu/kernels/storage.h"

namespace metamask::cpu {

// Each works on elements [begin, end) of contiguous arrays. `types` are those of weight and mask, and of their gradients. A null
// input is zero, a null output is not computed.
struct MaskedWeightKernels {
  void (*forward)(Gate gate, ParamTypes types, Type out, const void* w, const void* m, void* theta, int64_t begin, int64_t end);
  // theta, of the gradient's type, comes with the gradients at the cost of a store: the gate is evaluated once. It is that of the
  // parameters as they were.
  void (*backward)(Gate gate, ParamTypes types, Type grad, const void* g, const void* w, const void* m, void* theta, Sink dw,
                   Sink dm, int64_t begin, int64_t end);
  void (*double_backward)(Gate gate, ParamTypes types, Type grad, const void* a, const void* b, const void* g, const void* w,
                          const void* m, void* dg, void* dw, void* dm, int64_t begin, int64_t end);

  // The gradients of one task in a mixed-task batch, whose tasks share W. g, h, theta, c and dw have the type of the arithmetic; dw
  // is added to. backward_add is backward. second_backward_add differentiates a product with theta a second time: a and b are the
  // cotangents of the gradients dw and dm that g led to, h is one more gradient of theta, and c is the gradient of g.
  void (*backward_add)(Gate gate, ParamTypes types, const void* g, const void* w, const void* m, void* theta, void* dw, void* dm,
                       int64_t n);
  void (*second_backward_add)(Gate gate, ParamTypes types, const void* a, const void* b, const void* g, const void* h,
                              const void* w, const void* m, void* theta, void* c, void* dw, void* dm, int64_t n);
};

METAMASK_DECLARE_TABLES(MaskedWeightKernels, kMaskedWeight);

}  // namespace metamask::cpu
