// Small matrix products between tiles that are in cache, one table for each instruction set. The rows that are multiplied are kept
// padded to kRowBytes with zeros (or finite numbers times zeros), so that no loop has a remainder of columns.
#pragma once

#include <cstdint>

#include "cpu/kernels/isa.h"
#include "cpu/kernels/storage.h"

namespace metamask::cpu {

constexpr int64_t kRowBytes = 64;

// Two neighbours along the sum, multiplied and added by one instruction: a row of pairs is a row of bfloat16, or two rows of it
// interleaved.
struct Pair {
  BFloat16 first, second;
};

// Products of elements T, added up as Sum.
template <class T, class Sum = T>
struct GemmKernels {
  // y[i, j] += sum over k of a[i, k] b[j, k], for i < rows, j < columns, k < length; a row of a, b or y begins `*_row` after the
  // last.
  void (*gemm_nt)(const T* a, int64_t a_row, const T* b, int64_t b_row, Sum* y, int64_t y_row, int64_t rows, int64_t columns,
                  int64_t length);
  // y[i, k] (+)= sum over j of a[i, j] b[j, k], for i < rows, j < terms, k < length; element (i, j) of a is a[i * a_row + j *
  // a_next]. With `add` it is added to y, else y is overwritten.
  void (*gemm_nn)(const T* a, int64_t a_row, int64_t a_next, const T* b, int64_t b_row, Sum* y, int64_t y_row, int64_t rows,
                  int64_t terms, int64_t length, bool add);
};

struct Gemm {
  GemmKernels<float> float32;
  GemmKernels<double> float64;
  GemmKernels<Pair, float> bfloat16;  // null where the instruction set cannot multiply it
};

METAMASK_DECLARE_TABLES(Gemm, kGemm);

}  // namespace metamask::cpu
