// The loops over bit-packed masks, one table for each instruction set. theta = W where the bit is set, else 0: a weight that is off
// is 0 whatever it was, and 0 times an input that is not finite is NaN, as in a dense product.
//
// Rows of x, dx, theta and the gradient's tile are padded to kRowBytes (cpu/kernels/gemm.h); what is read there is zero. Rows of W
// and of bits are read to their last element and no further. `bits[i]` is the mask of sample row i, whose row j begins at offset +
// j * bits_row; column 0 of the others is bit 0 of that byte.
#pragma once

#include <cstdint>

#include "cpu/kernels/gemm.h"
#include "cpu/kernels/isa.h"

namespace metamask::cpu {

struct BitRows {
  const uint8_t* const* bits;  // one for each row of samples
  int64_t offset, row;
};

template <class T>
struct PackedKernels {
  // y[i, j] += sum over k of x[i, k] theta_i[j, k], for i < rows, j < outputs, k < columns. finite: all of x is finite; false is
  // always right, and slower. next: the start of the next tile of W, as large as this one, whose bits follow those of this one; or
  // null.
  void (*forward)(const T* x, int64_t x_row, bool finite, BitRows bits, const T* w, int64_t w_row, const T* next, T* y,
                  int64_t y_row, int64_t rows, int64_t outputs, int64_t columns);
  // dx[i, k] += sum over j of dy[i, j] theta_i[j, k].
  void (*input_gradient)(const T* dy, int64_t dy_row, BitRows bits, const T* w, int64_t w_row, T* dx, int64_t dx_row, int64_t rows,
                         int64_t outputs, int64_t columns);
  // dw[j, k] += sum over i with bit (j, k) of dy[i, j] x[i, k].
  void (*weight_gradient)(const T* dy, int64_t dy_row, BitRows bits, const T* x, int64_t x_row, T* dw, int64_t dw_row, int64_t rows,
                          int64_t outputs, int64_t columns);
  // theta of one task, its rows padded with zeros.
  void (*expand)(const uint8_t* bits, int64_t bits_row, const T* w, int64_t w_row, T* theta, int64_t theta_row, int64_t outputs,
                 int64_t columns);
  // dw[j, k] += g[j, k] where the bit is set.
  void (*add_masked)(const uint8_t* bits, int64_t bits_row, const T* g, int64_t g_row, T* dw, int64_t dw_row, int64_t outputs,
                     int64_t columns);
  // Convert between the type that a parameter is stored in and T.
  void (*widen)(Type from, const void* w, T* to, int64_t n);
  void (*narrow)(const T* from, Type to, void* w, int64_t n);
};

struct Packed {
  PackedKernels<float> float32;
  PackedKernels<double> float64;
};

METAMASK_DECLARE_TABLES(Packed, kPacked);

}  // namespace metamask::cpu
