// pack_mask and unpack_mask: between logits and masks of one bit a weight.
#pragma once

#include "cuda/kernels/device.cuh"

namespace metamask::cuda {

// A thread makes one byte.
template <class P>
__global__ void __launch_bounds__(kThreads)
    pack_mask_kernel(const P* logits, Compute<P> threshold, uint8_t* packed, int64_t rows, int64_t columns) {
  const int64_t bytes = (columns + 7) / 8, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (!IN_BOUNDS(i < rows * bytes)) return;
  const int64_t row = i / bytes, first = i % bytes * 8;
  unsigned byte = 0;
  for (int k = 0; k < 8; ++k) {
    if IN_BOUNDS (first + k < columns) byte |= unsigned(to_compute(logits[row * columns + first + k]) > threshold) << k;
  }
  packed[i] = uint8_t(byte);
}

// A thread makes one element.
static __global__ void __launch_bounds__(kThreads)
    unpack_mask_kernel(const uint8_t* packed, bool* mask, int64_t rows, int64_t columns) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = i / columns, k = i % columns;
  if (IN_BOUNDS(i < rows * columns)) mask[i] = packed[row * ((columns + 7) / 8) + k / 8] >> (k % 8) & 1;
}

}  // namespace metamask::cuda
