// masked_linear for small batches: theta = W g(M) exists only in registers, each of W and M is read once. The floor is the bytes of
// W and M over bandwidth.
//
// y [batch, out] = x [batch, in] theta^T. A block of kWarps warps makes 16 outputs: its warps take turns on steps of 32 columns of
// theta, so that a block reads its 16 rows in stretches of 256 elements. In a step a lane has a chunk of 2 x 8 of theta: with
// g = lane / 4 and t = lane % 4 rows g and g + 8, columns 8 t to 8 t + 7. Sums over columns have no order of their own: theta and x
// take the same one, that in which a lane's loads are neighbours, and the chunk is a fragment of the tensor cores as it is.
//
// gridDim.y blocks share the columns (`columns_each` each). The sums of warps, then of blocks (split_k.cuh), are added in a fixed
// order: the same numbers every time.
#pragma once

#include "cuda/kernels/split_k.cuh"
#include "cuda/kernels/vector_access.cuh"

namespace metamask::cuda {

constexpr int kWarps = 8, kBlock = 32 * kWarps;
constexpr int kRowsOfTile = 16, kChunk = 8, kColumnsOfStep = 4 * kChunk;

// Loads N neighbours of a row of `columns` elements, with zeros beyond its end. kAligned: rows are whole packs of kPackBytes,
// aligned. kInside: none lies beyond the end.
template <bool kAligned, bool kInside = false, int N, class T>
DEVICE_INLINE void load_raw(const T* row, int64_t column, int64_t columns, T (&to)[N]) {
  constexpr int kWidest = kPackBytes / int(sizeof(T)), kPack = !kAligned ? 1 : N < kWidest ? N : kWidest;
  for (int j = 0; j < N; j += kPack) {
    const Pack<T, kPack> pack = load_pack<kPack, true, kInside>(row, column + j, columns);
    for (int k = 0; k < kPack; ++k) to[j + k] = pack.value[k];
  }
}

template <bool kAligned, int N, class T>
DEVICE_INLINE void load_chunk(const T* row, int64_t column, int64_t columns, Compute<T> (&to)[N]) {
  T raw[N];
  load_raw<kAligned>(row, column, columns, raw);
  for (int j = 0; j < N; ++j) to[j] = to_compute(raw[j]);
}

// c [16, 8] += A [16, 4 R] B [4 R, 8] over a warp. A lane has R factors of rows g and g + 8 of A and of column g of B; which of the
// 4 R they are does not matter, as long as it is the same for A and B.
template <int R>
DEVICE_INLINE void mma_chunk(float (&c)[4], const float (&upper)[R], const float (&lower)[R], const float (&column)[R]) {
  for (int j = 0; j < R; j += 2) {
    const uint32_t a[4] = {to_tf32(upper[j]), to_tf32(lower[j]), to_tf32(upper[j + 1]), to_tf32(lower[j + 1])};
    const uint32_t b[2] = {to_tf32(column[j]), to_tf32(column[j + 1])};
    mma_tf32(c, a, b);
  }
}

template <class T>
DEVICE_INLINE uint32_t pair_bits(T low, T high) {
  const T both[2] = {low, high};
  uint32_t bits;
  memcpy(&bits, both, sizeof bits);
  return bits;
}

template <int R, class T>
DEVICE_INLINE void mma_chunk(float (&c)[4], const T (&upper)[R], const T (&lower)[R], const T (&column)[R]) {
  for (int j = 0; j < R; j += 4) {
    const uint32_t a[4] = {pair_bits(upper[j], upper[j + 1]), pair_bits(lower[j], lower[j + 1]),
                           pair_bits(upper[j + 2], upper[j + 3]), pair_bits(lower[j + 2], lower[j + 3])};
    const uint32_t b[2] = {pair_bits(column[j], column[j + 1]), pair_bits(column[j + 2], column[j + 3])};
    mma_16_bit<T>(c, a, b);
  }
}

// Rows of a matrix by their numbers in a batch: neighbours, or (`order`) anywhere.
template <class X>
struct Rows {
  const X* first;
  int64_t stride;
  const int64_t* order = nullptr;

  DEVICE_INLINE const X* operator[](int64_t b) const { return first + (order == nullptr ? b : order[b]) * stride; }
  // Returns the rows from row b on.
  DEVICE_INLINE Rows from(int64_t b) const {
    return order == nullptr ? Rows{first + b * stride, stride} : Rows{first, stride, order + b};
  }
};

// --- The product of a warp's theta [16, 32] and x, with room for kBatch_ rows of x. X is the type of x and y, Sum that of the
// sums.

// Multiplies in tensor cores: X is float (as tf32), __nv_bfloat16 or __half, and theta is rounded to it.
template <class X_, int kBatch_>
struct TensorForward {
  using X = X_;
  using Sum = float;
  static constexpr int kBatch = kBatch_;
  float sums[kBatch / 8][4] = {};

  // Adds the products with rows `begin` to `end` of x. kAlone: no others are ever added to these sums; else, what is not finite in
  // theta must not reach them (in the tensor cores it meets their rows too, as zeros). kInside: no column lies beyond the end.
  template <bool kAligned, bool kAlone = true, bool kInside = false>
  DEVICE_INLINE void add(const float (&theta)[2][kChunk], const Rows<X>& x, int64_t column, int begin, int end, int64_t in) {
    X rounded[2][kChunk];
    for (int r = 0; r < 2; ++r) {
      for (int j = 0; j < kChunk; ++j) from_compute(theta[r][j], rounded[r][j]);
    }
    const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < kBatch / 8; ++n) {
      if (8 * n >= end || 8 * (n + 1) <= begin) continue;
      const int b = 8 * n + g;
      const bool there = IN_BOUNDS(b >= begin && b < end);
      X of_x[kChunk];
      load_raw<kAligned, kAlone && kInside>(x[there ? b : begin], column, there ? in : 0, of_x);
      if constexpr (kAlone) {
        mma_chunk(sums[n], rounded[0], rounded[1], of_x);
      } else {
        float c[4] = {};
        mma_chunk(c, rounded[0], rounded[1], of_x);
        for (int i = 0; i < 4; ++i) {
          const int of_c = 8 * n + 2 * t + i % 2;
          if (of_c >= begin && of_c < end) sums[n][i] += c[i];
        }
      }
    }
  }

  DEVICE_INLINE void finish() {}

  // Calls run(row, b, sum) for the lane's results.
  template <class Run>
  DEVICE_INLINE void each(Run run) const {
    const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < kBatch / 8; ++n) {
      for (int i = 0; i < 4; ++i) run(g + 8 * (i / 2), 8 * n + 2 * t + i % 2, sums[n][i]);
    }
  }
};

// Multiplies plainly: exact float32, and float64.
template <class T, int kBatch_>
struct PlainForward {
  using X = T;
  using Sum = T;
  static constexpr int kBatch = kBatch_;
  T sums[2][kBatch] = {};

  template <bool kAligned, bool kAlone = true, bool kInside = false>
  DEVICE_INLINE void add(const T (&theta)[2][kChunk], const Rows<T>& x, int64_t column, int begin, int end, int64_t in) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (b < begin || b >= end) continue;
      T of_x[kChunk];
      load_raw<kAligned, kInside>(x[b], column, in, of_x);
      for (int j = 0; j < kChunk; ++j) {
        for (int r = 0; r < 2; ++r) sums[r][b] += theta[r][j] * of_x[j];
      }
    }
  }

  // The four lanes of a row have a quarter of its columns each.
  DEVICE_INLINE void finish() {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      for (int r = 0; r < 2; ++r) {
        sums[r][b] += __shfl_xor_sync(~0u, sums[r][b], 1);
        sums[r][b] += __shfl_xor_sync(~0u, sums[r][b], 2);
      }
    }
  }

  template <class Run>
  DEVICE_INLINE void each(Run run) const {
    const int lane = int(threadIdx.x) % 32;
    if (lane % 4 != 0) return;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      for (int r = 0; r < 2; ++r) run(lane / 4 + 8 * r, b, sums[r][b]);
    }
  }
};

// Adds up the warps' results in `total`, seen by all threads.
template <int kRows, int kColumns, class Sum, class Product>
DEVICE_INLINE void add_warps(Sum (&total)[kRows][kColumns], const Product& product) {
  const int warp = int(threadIdx.x) / 32;
  for (int turn = 0; turn < kWarps; ++turn) {
    if (warp == turn) {
      product.each([&](int row, int column, Sum sum) { total[row][column] = turn == 0 ? sum : total[row][column] + sum; });
    }
    __syncthreads();
  }
}

// w: [out, in] of P; m: [out, in] of M; x: [batch, in], bias: [out] or null, y: [batch, out], all of X. A batch too large for a
// lane's sums is cut into windows: the blocks of a tile's windows run side by side, so that W and M come from memory once.
template <GateKind kind, bool kAligned, class P, class M, class Product>
__global__ void __launch_bounds__(kBlock, sizeof(typename Product::Sum) == 4 ? 2 : 1)
    masked_linear_kernel(Compute<P> gate_param, const typename Product::X* x, const P* w, const M* m,
                         const typename Product::X* bias, typename Product::X* y, SplitK<typename Product::Sum> split, int batch,
                         int64_t out, int64_t in, int64_t columns_each) {
  using Sum = typename Product::Sum;
  SHARED(Sum, total, [kRowsOfTile][Product::kBatch]);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int windows = (batch + Product::kBatch - 1) / Product::kBatch, window = int(blockIdx.x) % windows * Product::kBatch;
  const int count = batch - window < Product::kBatch ? batch - window : Product::kBatch;
  const int64_t first_row = int64_t(int(blockIdx.x) / windows) * kRowsOfTile;
  const int64_t first = blockIdx.y * columns_each, last = first + columns_each < in ? first + columns_each : in;
  const Rows<typename Product::X> rows{x + window * in, in};
  const P* w_rows[2];
  const M* m_rows[2];
  for (int r = 0; r < 2; ++r) {
    // Instead of a row beyond the last one the last one is computed again, for nobody.
    const int64_t row = first_row + g + 8 * r, begin = (IN_BOUNDS(row < out) ? row : out - 1) * in;
    w_rows[r] = w + begin;
    m_rows[r] = m + begin;
  }
  Product product;
  const auto add_step = [&]<bool kInside>(int64_t step) {
    const int64_t column = step + kChunk * t;
    P w_[2][kChunk];
    M m_[2][kChunk];
    // All of it, before anything waits for a part.
    for (int r = 0; r < 2; ++r) {
      load_raw<kAligned, kInside>(w_rows[r], column, in, w_[r]);
      load_raw<kAligned, kInside>(m_rows[r], column, in, m_[r]);
    }
    Sum theta[2][kChunk];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) theta[r][j] = theta_of<kind>(to_compute(w_[r][j]), to_compute(m_[r][j]), gate_param);
    }
    product.template add<kAligned, true, kInside>(theta, rows, column, 0, count, in);
  };
  int64_t step = first + warp * kColumnsOfStep;
  if constexpr (kAligned) {
    for (; step + kColumnsOfStep <= last; step += kWarps * kColumnsOfStep) add_step.template operator()<true>(step);
    if (step < last) add_step.template operator()<false>(step);
  } else {
    for (; step < last; step += kWarps * kColumnsOfStep) add_step.template operator()<false>(step);
  }
  product.finish();
  add_warps(total, product);
  add_parts<kRowsOfTile * Product::kBatch>(
      split, blockIdx.x, blockIdx.y, gridDim.y, kRowsOfTile * count, [&](int i) { return total[i % kRowsOfTile][i / kRowsOfTile]; },
      [&](int i, Sum sum) {
        const int64_t row = first_row + i % kRowsOfTile;
        if (!IN_BOUNDS(row < out)) return;
        if (bias != nullptr) sum += to_compute(bias[row]);
        from_compute(sum, y[int64_t(window + i / kRowsOfTile) * out + row]);
      });
}

}  // namespace metamask::cuda
