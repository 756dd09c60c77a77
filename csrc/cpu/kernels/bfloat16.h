// The kernels, beside gemm.h, with which masked_linear works in bfloat16 throughout. For processors that multiply bfloat16.
#pragma once

#include <cstdint>

#include "cpu/kernels/gemm.h"
#include "cpu/kernels/storage.h"

namespace metamask::cpu {

struct BFloat16Kernels {
  // forward and backward of cpu/kernels/masked_weight.h on the first n elements: the gradient g is float32, theta bfloat16. The
  // forward's sigmoid is right to 7e-5, a thirtieth of the error of rounding theta; backward's to 3e-6.
  void (*theta)(Gate gate, ParamTypes types, const void* w, const void* m, BFloat16* theta, int64_t n);
  void (*backward)(Gate gate, ParamTypes types, const float* g, const void* w, const void* m, BFloat16* theta, const Sink& dw,
                   const Sink& dm, int64_t n);
  // Makes rows 2i and 2i + 1 of a matrix row i of pairs; an odd last row is paired with zeros. A row of pairs is filled with zeros
  // to the end of its last vector.
  void (*pair_rows)(const BFloat16* from, int64_t row, int64_t rows, int64_t columns, Pair* to, int64_t to_row);
  void (*round)(const float* from, BFloat16* to, int64_t n);
};

#if defined(METAMASK_X86)
extern const BFloat16Kernels kBFloat16_avx512_bf16;
#endif

}  // namespace metamask::cpu
