// packed_masked_linear: y_b = x_b theta_t^T with theta_t = where(bit_t, W, 0), where t is the task of row b. The floor is the bytes
// of W and an eighth of a byte for each weight and task of the batch; W is read once for as many rows as a block has room for.
//
// Tiles and lanes are those of masked_linear.cuh and masked_linear_backward.cuh; the eight neighbours that a lane has in a row of W
// are one byte of a mask. A row whose task is that of the row before it takes theta as it is.
#pragma once

#include "cuda/kernels/masked_linear_backward.cuh"
#include "cuda/kernels/segments.cuh"

namespace metamask::cuda {

struct PackedSizes {
  int64_t rows, rows_per_sample, groups, out, in, tasks, tiles;  // tiles: of a group's rows of W

  DEVICE_INLINE int64_t group_out() const { return out / groups; }
  DEVICE_INLINE int64_t row_bytes() const { return (in + 7) / 8; }
};

// Rows of x in one block: their sums are 64 registers of a lane.
template <class T>
constexpr int kPackedRoom = 128 / int(sizeof(T));
template <class T>
constexpr int kPackedBackwardRoom = 32 / int(sizeof(T));

DEVICE_INLINE const uint8_t* bits_of(const PerTask& bits, const PackedSizes& sizes, const int64_t* slots, int64_t sample) {
  const int64_t task = slots[sample];
  DEVICE_ASSERT(task >= 0 && task < sizes.tasks);
  return array_of<const uint8_t>(bits, task);
}

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

// With `split_k_sums` [gridDim.z, rows, out] the sums go there instead of y.
template <bool kAligned, class P>
__global__ void __launch_bounds__(kBlock)
    packed_masked_linear_kernel(PackedSizes sizes, const int64_t* slots, const P* w, PerTask bits, const Compute<P>* bias,
                                PerTask bias_bits, const Compute<P>* x, Compute<P>* y, Compute<P>* split_k_sums,
                                int64_t columns_each) {
  using T = Compute<P>;
  constexpr int kRoom = kPackedRoom<T>;
  SHARED(T, total, [kRowsOfTile][kRoom]);
  SHARED(const uint8_t*, masks, [kRoom]);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int64_t in = sizes.in, group_out = sizes.group_out(), group = blockIdx.y / sizes.tiles;
  const int64_t first_row = group * group_out + blockIdx.y % sizes.tiles * kRowsOfTile, end_row = (group + 1) * group_out;
  const int64_t window = int64_t(blockIdx.x) * kRoom;
  const int count = int(sizes.rows - window < kRoom ? sizes.rows - window : kRoom);
  const int64_t first = blockIdx.z * columns_each, last = first + columns_each < in ? first + columns_each : in;
  find_bits(masks, bits, sizes, slots, window, count);
  const T* const rows_of_x = x + (window * sizes.groups + group) * in;
  PlainForward<T, kRoom> product;
  for (int64_t step = first + warp * kColumnsOfStep; step < last; step += kWarps * kColumnsOfStep) {
    const int64_t column = step + kChunk * t;
    T w_[2][kChunk], theta[2][kChunk];
    for (int r = 0; r < 2; ++r) {
      const int64_t row = first_row + g + 8 * r;
      load_chunk<kAligned>(w + row * in, column, IN_BOUNDS(row < end_row) ? in : 0, w_[r]);
    }
    const uint8_t* mask = nullptr;
#pragma unroll
    for (int b = 0; b < kRoom; ++b) {
      if (b >= count) continue;
      if (masks[b] != mask) {
        mask = masks[b];
        for (int r = 0; r < 2; ++r) {
          const int64_t row = first_row + g + 8 * r;
          unsigned byte = 0;
          if IN_BOUNDS (row < end_row && column < in) byte = mask[row * sizes.row_bytes() + column / 8];
          keep(byte, w_[r], theta[r]);
        }
      }
      T of_x[kChunk];
      load_raw<kAligned>(rows_of_x + b * sizes.groups * in, column, in, of_x);
      for (int j = 0; j < kChunk; ++j) {
        for (int r = 0; r < 2; ++r) product.sums[r][b] += theta[r][j] * of_x[j];
      }
    }
  }
  product.finish();
  add_warps(total, product);
  for (int i = int(threadIdx.x); i < kRowsOfTile * count; i += kBlock) {
    const int b = i / kRowsOfTile;
    const int64_t row = first_row + i % kRowsOfTile;
    if (!IN_BOUNDS(row < end_row)) continue;
    T sum = total[i % kRowsOfTile][b];
    if (blockIdx.z == 0 && bias != nullptr) {
      const bool masked = bias_bits.first != nullptr || bias_bits.table != nullptr;
      const int64_t sample = (window + b) / sizes.rows_per_sample;
      if (!masked || (bits_of(bias_bits, sizes, slots, sample)[row / 8] >> (row % 8) & 1)) sum += bias[row];
    }
    const int64_t to = (window + b) * sizes.out + row;
    if (split_k_sums != nullptr) split_k_sums[int64_t(blockIdx.z) * sizes.rows * sizes.out + to] = sum;
    else y[to] = sum;
  }
}

// dx_b = dy_b theta_t. With `split_k_sums` [gridDim.y, rows, groups * in] the sums go there instead.
template <bool kAligned, class P>
__global__ void __launch_bounds__(kBlock)
    packed_input_gradient_kernel(PackedSizes sizes, const int64_t* slots, const P* w, PerTask bits, const Compute<P>* dy,
                                 Compute<P>* dx, Compute<P>* split_k_sums, int64_t rows_each) {
  using T = Compute<P>;
  constexpr int kRoom = kPackedBackwardRoom<T>, kStrip = 8 * kChunk, kRows = 2;
  SHARED(T, total, [kRoom][kStrip]);
  SHARED(const uint8_t*, masks, [kRoom]);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int64_t in = sizes.in, group = blockIdx.z, group_end = (group + 1) * sizes.group_out();
  // The windows of a strip run side by side, so that it comes from memory once.
  const int64_t windows = (sizes.rows + kRoom - 1) / kRoom, window = int64_t(blockIdx.x) % windows * kRoom;
  const int64_t first_column = int64_t(blockIdx.x) / windows * kStrip, column = first_column + kChunk * g;
  const int count = int(sizes.rows - window < kRoom ? sizes.rows - window : kRoom);
  const int64_t first = group * sizes.group_out() + blockIdx.y * rows_each;
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
    if (split_k_sums != nullptr) split_k_sums[int64_t(blockIdx.y) * sizes.rows * sizes.groups * in + to] = sum;
    else dx[to] = sum;
  }
}

// dw = the sum over rows of where(bit, dy^T x, 0): a lane has two rows and eight columns of it to itself, and takes all rows in
// turn.
template <bool kAligned, class P>
__global__ void __launch_bounds__(kBlock) packed_weight_gradient_kernel(PackedSizes sizes, const int64_t* slots, PerTask bits,
                                                                        const Compute<P>* dy, const Compute<P>* x, P* dw) {
  using T = Compute<P>;
  constexpr int kRows = 2;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int64_t in = sizes.in, group = blockIdx.z, group_end = (group + 1) * sizes.group_out();
  const int64_t column = (int64_t(blockIdx.x) * 8 + g) * kChunk;
  const int64_t first = group * sizes.group_out() + (int64_t(blockIdx.y) * kWarps + warp) * 4 * kRows + kRows * t;
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
