// Split-K: adds up the sums of the blocks that share one, in a fixed order, so that the numbers are the same every time.
#pragma once

#include "cuda/kernels/launch.cuh"

namespace metamask::cuda {

// result [rows, columns] = the sum over `count` of split_k_sums [count, rows, columns] (+ bias [columns]), n = rows * columns
template <class X, class Sum>
__global__ void __launch_bounds__(kThreads)
    add_split_k_kernel(const Sum* split_k_sums, const X* bias, X* result, int count, int64_t n, int64_t columns) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (!IN_BOUNDS(i < n)) return;
  Sum sum = 0;
  for (int part = 0; part < count; ++part) sum += split_k_sums[part * n + i];
  if (bias != nullptr) sum += to_compute(bias[i % columns]);
  from_compute(sum, result[i]);
}

template <class X, class Sum>
void add_split_k(const Sum* split_k_sums, const void* bias, void* result, int count, int64_t rows, int64_t columns,
                 cudaStream_t stream) {
  const int64_t n = rows * columns;
  launch(add_split_k_kernel<X, Sum>, grid_of(ceil_div(n, kThreads)), dim3(kThreads), 0, stream, split_k_sums, in<X>(bias),
         out<X>(result), count, n, columns);
}

}  // namespace metamask::cuda
