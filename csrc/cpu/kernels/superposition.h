// The loop of packed_superposition_gradient, one table for each instruction set.
#pragma once

#include "cpu/kernels/gemm.h"
#include "cpu/kernels/isa.h"

namespace metamask::cpu {

constexpr int64_t kSuperposedColumns = 256, kSuperposedTasks = 256, kTaskPad = 16;

template <class T>
struct SuperpositionKernel {
  // sums[b, t] += sum over k of a[b, k] w[k] where bit k of the row bits[t] + offset is set, for b < samples, t < tasks, k <
  // columns; at most kSuperposedColumns and kSuperposedTasks. Rows of a are padded to kRowBytes with zeros, those of sums to
  // kTaskPad elements; w and the bits are read to their last element and no further.
  void (*add)(const T* a, int64_t a_row, const T* w, const uint8_t* const* bits, int64_t offset, T* sums, int64_t sums_row,
              int64_t samples, int64_t tasks, int64_t columns);
};

struct Superposition {
  SuperpositionKernel<float> float32;
  SuperpositionKernel<double> float64;
};

METAMASK_DECLARE_TABLES(Superposition, kSuperposition);

}  // namespace metamask::cpu
