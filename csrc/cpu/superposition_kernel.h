// The loop of packed_superposition_gradient, one table for each instruction set.
//
// Samples lie side by side: element (i, l) of a matrix is i * kLanes<T> + l with l the sample, so that a vector belongs to one
// weight and the bits of a task, which all samples share, choose what is added by an address.
#pragma once

#include "product_kernel.h"

namespace metamask::cpu {

template <class T>
constexpr int64_t kLanes = kRowBytes / int64_t(sizeof(T));

constexpr int64_t kWord = 64;  // columns whose bits are one word

template <class T>
struct SuperpositionKernel {
  // sums[t, l] += sum over j, k and r of w[j, k] dy_r[j, l] x_r[k, l] where bit (j, k) of task t is set, for t < tasks, j <
  // outputs, k < columns, r < rows; dy_r begins r * dy_row after dy, x_r likewise. Bit (j, k) of task t is bit k % kWord of the
  // word (k / kWord * outputs + j) * tasks + t. w is read to its last element and no further.
  void (*add)(const T* dy, int64_t dy_row, const T* x, int64_t x_row, const T* w, int64_t w_row, const uint64_t* words, T* sums,
              int64_t rows, int64_t tasks, int64_t outputs, int64_t columns);
};

struct Superposition {
  SuperpositionKernel<float> float32;
  SuperpositionKernel<double> float64;
};

extern const Superposition kSuperposition_default;
#if defined(METAMASK_X86)
extern const Superposition kSuperposition_avx2;
extern const Superposition kSuperposition_avx512;
extern const Superposition kSuperposition_avx512_bf16;
#endif

}  // namespace metamask::cpu
