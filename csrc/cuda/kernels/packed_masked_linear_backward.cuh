// The gradients of packed_masked_linear. Tiles and lanes are those of masked_linear_backward.cuh; the eight neighbours that a lane
// has in a row of W are one byte of a mask. A row whose task is that of the row before it takes theta as it is.
#pragma once

#include "cuda/kernels/grid.cuh"
#include "cuda/kernels/masked_linear_backward.cuh"
#include "cuda/kernels/packed_sizes.cuh"

namespace metamask::cuda {

// Rows of the batch in one block.
template <class T>
constexpr int kPackedBackwardRoom = 32 / int(sizeof(T));

// Finds the bits of each row's mask, for all threads to see.
template <int kRoom>
DEVICE_INLINE void find_bits(const uint8_t* (&found)[kRoom], const PerTask& bits, const PackedSizes& sizes, const int64_t* slots,
                             int64_t window, int count) {
  const int i = int(threadIdx.x);
  if (IN_BOUNDS(i < count)) found[i] = bits_of(bits, sizes, slots, (window + i) / sizes.rows_per_sample);
  __syncthreads();
}

// Makes theta: zero for a bit that is off, whatever the weight is.
template <class T, int N>
DEVICE_INLINE void keep(unsigned byte, const T (&w)[N], T (&theta)[N]) {
  for (int j = 0; j < N; ++j) theta[j] = byte >> j & 1 ? w[j] : T(0);
}

// dx_b = dy_b theta_t. With `split_k_sums` [grid.y, rows, groups * in] the sums go there instead.
template <bool kAligned, class P>
__global__ void __launch_bounds__(kBlock)
    packed_input_gradient_kernel(PackedSizes sizes, const int64_t* slots, const P* w, PerTask bits, const Compute<P>* dy,
                                 Compute<P>* dx, Compute<P>* split_k_sums, int64_t rows_each, Grid grid) {
  using T = Compute<P>;
  constexpr int kRoom = kPackedBackwardRoom<T>, kStrip = 8 * kChunk, kRows = 2;
  SHARED(T, total, [kRoom][kStrip]);
  SHARED(const uint8_t*, masks, [kRoom]);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const uint3 place = grid.place();
  const int64_t in = sizes.in, group = place.z, group_end = (group + 1) * sizes.group_out();
  // The windows of a strip run side by side, so that it comes from memory once.
  const int64_t windows = (sizes.rows + kRoom - 1) / kRoom, window = int64_t(place.x) % windows * kRoom;
  const int64_t first_column = int64_t(place.x) / windows * kStrip, column = first_column + kChunk * g;
  const int count = int(sizes.rows - window < kRoom ? sizes.rows - window : kRoom);
  const int64_t first = group * sizes.group_out() + place.y * rows_each;
  const int64_t last = first + rows_each < group_end ? first + rows_each : group_end;
  find_bits(masks, bits, sizes, slots, window, count);
  PlainBackward<T, kRoom> product;
  static_assert(PlainBackward<T, kRoom>::kColumns == kChunk && PlainBackward<T, kRoom>::kRows == kRows);
  for (int64_t step = first + warp * 4 * kRows; step < last; step += kWarps * 4 * kRows) {
    T w_[kRows][kChunk], theta[kRows][kChunk];
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = step + kRows * t + r;
      load_chunk<kAligned>(w + row * in, column, IN_BOUNDS(row < group_end) ? in : 0, w_[r]);
    }
    const uint8_t* mask = nullptr;
#pragma unroll
    for (int b = 0; b < kRoom; ++b) {
      if (b >= count) continue;
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = step + kRows * t + r;
        if (masks[b] != mask) {
          unsigned byte = 0;
          if IN_BOUNDS (row < group_end && column < in) byte = masks[b][row * sizes.row_bytes() + column / 8];
          keep(byte, w_[r], theta[r]);
        }
        T of_dy = 0;
        if IN_BOUNDS (row < group_end) of_dy = dy[(window + b) * sizes.out + row];
        for (int j = 0; j < kChunk; ++j) product.dx[b][j] += of_dy * theta[r][j];
      }
      mask = masks[b];
    }
  }
  product.finish();
  add_warps(total, product);
  for (int i = int(threadIdx.x); i < kStrip * count; i += kBlock) {
    const int64_t at = first_column + i % kStrip;
    if (!IN_BOUNDS(at < in)) continue;
    const T sum = total[i / kStrip][i % kStrip];
    const int64_t to = ((window + i / kStrip) * sizes.groups + group) * in + at;
    if (split_k_sums != nullptr) split_k_sums[int64_t(place.y) * sizes.rows * sizes.groups * in + to] = sum;
    else dx[to] = sum;
  }
}

// dw = the sum over rows of where(bit, dy^T x, 0): a lane has two rows and eight columns of it to itself, and takes all rows in
// turn.
template <bool kAligned, class P>
__global__ void __launch_bounds__(kBlock)
    packed_weight_gradient_kernel(PackedSizes sizes, const int64_t* slots, PerTask bits, const Compute<P>* dy, const Compute<P>* x,
                                  P* dw, Grid grid) {
  using T = Compute<P>;
  constexpr int kRows = 2;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const uint3 place = grid.place();
  const int64_t in = sizes.in, group = place.z, group_end = (group + 1) * sizes.group_out();
  const int64_t column = (int64_t(place.x) * 8 + g) * kChunk;
  const int64_t first = group * sizes.group_out() + (int64_t(place.y) * kWarps + warp) * 4 * kRows + kRows * t;
  T sums[kRows][kChunk] = {};
  for (int64_t b = 0, sample = 0; b < sizes.rows; ++sample) {
    const uint8_t* const mask = bits_of(bits, sizes, slots, sample);
    unsigned bytes[kRows] = {};
    for (int r = 0; r < kRows; ++r) {
      if IN_BOUNDS (first + r < group_end && column < in) bytes[r] = mask[(first + r) * sizes.row_bytes() + column / 8];
    }
    for (const int64_t end = b + sizes.rows_per_sample; b < end; ++b) {
      T of_x[kChunk];
      load_raw<kAligned>(x + (b * sizes.groups + group) * in, column, in, of_x);
      for (int r = 0; r < kRows; ++r) {
        T of_dy = 0;
        if IN_BOUNDS (first + r < group_end) of_dy = dy[b * sizes.out + first + r];
        for (int j = 0; j < kChunk; ++j) sums[r][j] += bytes[r] >> j & 1 ? of_dy * of_x[j] : T(0);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r, start = row * in;
    store_chunk<kAligned>(dw, start + column, start + (IN_BOUNDS(row < group_end) ? in : 0), false, sums[r]);
  }
}

}  // namespace metamask::cuda
