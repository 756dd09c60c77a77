// The gradient of a superposition of masks of one bit a weight.
#pragma once

#include "cuda/kernels/grid.cuh"
#include "cuda/kernels/masked_linear.cuh"
#include "cuda/kernels/packed_sizes.cuh"

namespace metamask::cuda {

constexpr int kSuperposedTasks = 64, kSuperposedSamples = 16, kSuperposedColumns = 64;

// result[b, t] = sum over the weights of bit_t P_b, P_b = dy_b^T x_b W. Of P a tile (a piece of a row of W, for kSuperposedSamples)
// is in shared memory at a time; a thread adds up four samples for one task, so that a bit decides for four. Four of a P lie side
// by side: one read. grid.z blocks share the rows of W; `split_k_sums` [grid.z, samples, tasks].
template <class P>
__global__ void __launch_bounds__(kBlock)
    packed_superposition_kernel(PackedSizes sizes, const P* w, PerTask bits, const Compute<P>* dy, const Compute<P>* x,
                                Compute<P>* split_k_sums, int64_t samples, int64_t rows_each, Grid grid) {
  using T = Compute<P>;
  constexpr int kSome = 4, kPad = 4;  // the padding spreads the writes of a column over the banks
  SHARED(T, products, [kSuperposedColumns][kSuperposedSamples + kPad]);
  const uint3 place = grid.place();
  const int64_t task = int64_t(place.x) * kSuperposedTasks + threadIdx.x % kSuperposedTasks;
  const int64_t first_sample = int64_t(place.y) * kSuperposedSamples;
  const int some = int(threadIdx.x) / kSuperposedTasks * kSome;
  const int64_t first = place.z * rows_each, last = first + rows_each < sizes.out ? first + rows_each : sizes.out;
  const int64_t in = sizes.in, each = sizes.rows_per_sample, row_bytes = sizes.row_bytes();
  const uint8_t* mask = nullptr;
  if IN_BOUNDS (task < sizes.tasks) mask = array_of<const uint8_t>(bits, task);
  T sums[kSome] = {};
  for (int64_t row = first; row < last; ++row) {
    const int64_t group = row / sizes.group_out();
    for (int64_t begin = 0; begin < in; begin += kSuperposedColumns) {
      for (int i = int(threadIdx.x); i < kSuperposedColumns * kSuperposedSamples; i += kBlock) {
        const int64_t column = begin + i % kSuperposedColumns, sample = first_sample + i / kSuperposedColumns;
        T product = 0;
        if IN_BOUNDS (column < in && sample < samples) {
          for (int64_t b = sample * each; b < (sample + 1) * each; ++b) {
            product += dy[b * sizes.out + row] * x[(b * sizes.groups + group) * in + column];
          }
          product *= to_compute(w[row * in + column]);
        }
        products[i % kSuperposedColumns][i / kSuperposedColumns] = product;
      }
      __syncthreads();
      for (int k = 0; k < kSuperposedColumns && mask != nullptr; k += 8) {
        unsigned byte = 0;
        if IN_BOUNDS (begin + k < in) byte = mask[row * row_bytes + (begin + k) / 8];
        for (int j = 0; j < 8; ++j) {
          if (!(byte >> j & 1)) continue;
          const Pack<T, kSome> four = *reinterpret_cast<const Pack<T, kSome>*>(&products[k + j][some]);
          for (int s = 0; s < kSome; ++s) sums[s] += four.value[s];
        }
      }
      __syncthreads();
    }
  }
  for (int s = 0; s < kSome; ++s) {
    const int64_t sample = first_sample + some + s;
    if IN_BOUNDS (task < sizes.tasks && sample < samples) {
      split_k_sums[(int64_t(place.z) * samples + sample) * sizes.tasks + task] = sums[s];
    }
  }
}

}  // namespace metamask::cuda
