// The backward of masked_linear for small batches: G = dy^T x exists only in accumulators, and its results (dW and dM, or the new W
// and M) are written from there. W and M are read once, for dx too. The floor is the bytes of W and M, and of what is written of
// their size, over bandwidth.
//
// A block has a strip of columns, and its warps take turns on steps of rows of theta. With g = lane / 4 and t = lane % 4 a lane has
// a chunk of kRows x kColumns: rows kRows t to kRows (t + 1) - 1 of the step, columns kColumns g to kColumns (g + 1) - 1 of the
// strip. So a warp's access to a row is 8 kColumns neighbours, and G^T [columns, rows] comes out of the tensor cores (with the
// numbering of columns and rows that this needs) in the lanes that hold W and M, and theta^T goes into them again, for dx^T =
// theta^T dy^T, from where it was computed.
//
// gridDim.y blocks share the rows (`rows_each` each). The sums of dx over warps, then over blocks, are added in a fixed order.
#pragma once

#include "cuda/kernels/masked_linear.cuh"

namespace metamask::cuda {

// Multiplies in tensor cores; X as in TensorForward.
template <class X_, int kBatch_>
struct TensorBackward {
  using X = X_;
  using Sum = float;
  static constexpr int kBatch = kBatch_, kColumns = 8, kBlocks = 1;
  static constexpr int kRows = sizeof(X) == 4 ? 2 : 4;                      // the factors of a lane in one mma
  static constexpr int kSamples = kBatch / 4 < kRows ? kRows : kBatch / 4;  // of the batch, in one lane
  X strip[kSamples][kColumns];                                              // x[kSamples t + s][columns of the lane]
  float dx[kColumns / 2][kBatch / 8][4] = {};

  template <bool kAligned>
  DEVICE_INLINE void start(const Rows<X>& x, int64_t column, int batch, int64_t in) {
    const int t = int(threadIdx.x) % 4;
    for (int s = 0; s < kSamples; ++s) {
      const int b = kSamples * t + s;
      const bool there = IN_BOUNDS(b < batch);
      load_raw<kAligned>(x[there ? b : 0], column, there ? in : 0, strip[s]);
    }
  }

  // Adds to G of the lane's chunk, in the step that begins at row `first` of theta, that of the batch whose x start() has read.
  // kInside: no row or column lies beyond the end.
  template <bool kAligned, bool kInside = false>
  DEVICE_INLINE void gradient(const Rows<X>& dy, const Rows<X>&, int64_t, int64_t first, int batch, int64_t out, int64_t,
                              float (&gradient)[kRows][kColumns]) const {
    const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int p = 0; p < kRows / 2; ++p) {
      const int64_t row = first + kRows * (g / 2) + 2 * p + g % 2;  // column g of this product
      X of_dy[kSamples];
      for (int s = 0; s < kSamples; ++s) {
        const int b = kSamples * t + s;
        of_dy[s] = X(0.0f);
        if (IN_BOUNDS(b < batch) && (kInside || IN_BOUNDS(row < out))) of_dy[s] = dy[b][row];
      }
#pragma unroll
      for (int j = 0; j < kColumns; j += 2) {
        X upper[kSamples], lower[kSamples];
        for (int s = 0; s < kSamples; ++s) {
          upper[s] = strip[s][j];
          lower[s] = strip[s][j + 1];
        }
        float c[4];
        for (int i = 0; i < 4; ++i) c[i] = gradient[2 * p + i % 2][j + i / 2];
        mma_chunk(c, upper, lower, of_dy);
        for (int i = 0; i < 4; ++i) gradient[2 * p + i % 2][j + i / 2] = c[i];
      }
    }
  }

  template <bool kInside = false>
  DEVICE_INLINE void add_dx(const float (&theta)[kRows][kColumns], const Rows<X>& dy, int64_t first, int batch, int64_t out) {
    const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < kBatch / 8; ++n) {
      if (8 * n >= batch) continue;
      const int b = 8 * n + g;
      X of_dy[kRows];
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = first + kRows * t + r;
        of_dy[r] = X(0.0f);
        if (IN_BOUNDS(b < batch) && (kInside || IN_BOUNDS(row < out))) of_dy[r] = dy[b][row];
      }
#pragma unroll
      for (int j = 0; j < kColumns; j += 2) {
        X upper[kRows], lower[kRows];
        for (int r = 0; r < kRows; ++r) {
          from_compute(theta[r][j], upper[r]);
          from_compute(theta[r][j + 1], lower[r]);
        }
        mma_chunk(dx[j / 2][n], upper, lower, of_dy);
      }
    }
  }

  DEVICE_INLINE void finish() {}

  // Calls run(b, column of the strip, sum) for the lane's part of dx.
  template <class Run>
  DEVICE_INLINE void each(Run run) const {
    const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < kColumns; j += 2) {
#pragma unroll
      for (int n = 0; n < kBatch / 8; ++n) {
        for (int i = 0; i < 4; ++i) run(8 * n + 2 * t + i % 2, kColumns * g + j + i / 2, dx[j / 2][n][i]);
      }
    }
  }
};

// Multiplies plainly: exact float32, and float64. The more samples, the fewer columns: dx's sums must stay in registers.
template <class T, int kBatch_, int kColumns_ = 256 / int(sizeof(T)) / kBatch_, int kRows_ = 2>
struct PlainBackward {
  using X = T;
  using Sum = T;
  static constexpr int kBatch = kBatch_, kColumns = kColumns_, kRows = kRows_;
  static constexpr int kBlocks = sizeof(T) == 4 && kBatch * kColumns <= 32 ? 2 : 1;  // a multiprocessor has registers for
  T dx[kBatch][kColumns] = {};

  template <bool kAligned>
  DEVICE_INLINE void start(const Rows<T>&, int64_t, int, int64_t) {}

  template <bool kAligned, bool kInside = false>
  DEVICE_INLINE void gradient(const Rows<T>& dy, const Rows<T>& x, int64_t column, int64_t first, int batch, int64_t out,
                              int64_t in, T (&gradient)[kRows][kColumns]) const {
#pragma unroll 1  // the registers of a second block are worth more than the loads of a second sample
    for (int b = 0; b < batch; ++b) {
      T of_x[kColumns], of_dy[kRows];
      load_raw<kAligned, kInside>(x[b], column, in, of_x);
      load_dy<kInside>(dy[b], first, out, of_dy);
      for (int r = 0; r < kRows; ++r) {
        for (int j = 0; j < kColumns; ++j) gradient[r][j] += of_dy[r] * of_x[j];
      }
    }
  }

  template <bool kInside = false>
  DEVICE_INLINE void add_dx(const T (&theta)[kRows][kColumns], const Rows<T>& dy, int64_t first, int batch, int64_t out) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (b >= batch) continue;
      T of_dy[kRows];
      load_dy<kInside>(dy[b], first, out, of_dy);
      for (int r = 0; r < kRows; ++r) {
        for (int j = 0; j < kColumns; ++j) dx[b][j] += of_dy[r] * theta[r][j];
      }
    }
  }

  // The four lanes of a column have other rows each.
  DEVICE_INLINE void finish() {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      for (int j = 0; j < kColumns; ++j) {
        dx[b][j] += __shfl_xor_sync(~0u, dx[b][j], 1);
        dx[b][j] += __shfl_xor_sync(~0u, dx[b][j], 2);
      }
    }
  }

  template <class Run>
  DEVICE_INLINE void each(Run run) const {
    const int lane = int(threadIdx.x) % 32;
    if (lane % 4 != 0) return;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      for (int j = 0; j < kColumns; ++j) run(b, kColumns * (lane / 4) + j, dx[b][j]);
    }
  }

 private:
  template <bool kInside>
  DEVICE_INLINE static void load_dy(const T* row_of_dy, int64_t first, int64_t out, T (&to)[kRows]) {
    const int t = int(threadIdx.x) % 4;
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + kRows * t + r;
      to[r] = 0;
      if (kInside || IN_BOUNDS(row < out)) to[r] = row_of_dy[row];
    }
  }
};

// store_or_descend for N neighbours of a row, from element `i` on; the row ends at element `end`.
template <bool kAligned, class P, bool kInside = false, int N>
DEVICE_INLINE void store_or_descend_chunk(const Sink& sink, int64_t i, int64_t end, const Compute<P> (&p)[N],
                                          const Compute<P> (&g)[N]) {
  constexpr int kWidest = kPackBytes / int(sizeof(P)), kPack = !kAligned ? 1 : N < kWidest ? N : kWidest;
  for (int j = 0; j < N; j += kPack) {
    Compute<P> of_p[kPack], of_g[kPack];
    for (int k = 0; k < kPack; ++k) {
      of_p[k] = p[j + k];
      of_g[k] = g[j + k];
    }
    store_or_descend<kPack, P, true, kInside>(sink, i + j, end, of_p, of_g);
  }
}

// Stores N neighbours of a row, from element i on; the row ends at element `end`. With `add` they are added to what is there.
template <bool kAligned, class T, int N>
DEVICE_INLINE void store_chunk(T* to, int64_t i, int64_t end, bool add, const Compute<T> (&from)[N]) {
  if (to == nullptr) return;
  constexpr int kWidest = kPackBytes / int(sizeof(T)), kPack = !kAligned ? 1 : N < kWidest ? N : kWidest;
  for (int j = 0; j < N; j += kPack) {
    Compute<T> some[kPack] = {};
    if (add) load<kPack, true>(to, i + j, end, some);
    for (int k = 0; k < kPack; ++k) some[k] += from[j + k];
    store<kPack, true>(to, i + j, end, some);
  }
}

// dy: [batch, out], x and dx: [batch, in], of X; w and what dw points to: [out, in] of P; m and what dm points to: [out, in] of M.
// dx null: it is not wanted.
template <GateKind kind, bool kAligned, class P, class M, class Product>
__global__ void __launch_bounds__(kBlock, kAligned ? Product::kBlocks : 1)
    masked_linear_backward_kernel(Compute<P> gate_param, const typename Product::X* dy, const typename Product::X* x, const P* w,
                                  const M* m, Sink dw, Sink dm, typename Product::X* dx, SplitK<typename Product::Sum> split,
                                  int batch, int64_t out, int64_t in, int64_t rows_each) {
  using Sum = typename Product::Sum;
  constexpr int kRows = Product::kRows, kColumns = Product::kColumns, kStrip = 8 * kColumns;
  SHARED(Sum, total, [Product::kBatch][kStrip]);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int64_t first_column = int64_t(blockIdx.x) * kStrip, column = first_column + kColumns * g;
  const int64_t first = blockIdx.y * rows_each, last = first + rows_each < out ? first + rows_each : out;
  const bool needs_g = dw.wanted() || dm.wanted();
  const Rows<typename Product::X> rows_of_x{x, in}, rows_of_dy{dy, out};
  Product product;
  product.template start<kAligned>(rows_of_x, column, batch, in);
  const auto add_step = [&]<bool kInside>(int64_t step) {
    P w_[kRows][kColumns];
    M m_[kRows][kColumns];
    const auto load_row = [&](int r) {
      const int64_t row = step + kRows * t + r, columns = kInside || IN_BOUNDS(row < out) ? in : 0;
      load_raw<kAligned, kInside>(w + row * in, column, columns, w_[r]);
      load_raw<kAligned, kInside>(m + row * in, column, columns, m_[r]);
    };
    // All rows before anything waits for one, if there are registers for them.
    constexpr bool kEarly = kAligned && Product::kBatch <= 8;
#pragma unroll
    for (int r = 0; kEarly && r < kRows; ++r) load_row(r);
    Sum gradient[kRows][kColumns] = {}, theta[kRows][kColumns];
    if (needs_g) product.template gradient<kAligned, kInside>(rows_of_dy, rows_of_x, column, step, batch, out, in, gradient);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = step + kRows * t + r, begin = row * in, columns = kInside || IN_BOUNDS(row < out) ? in : 0;
      if constexpr (!kEarly) load_row(r);
      Compute<P> old_w[kColumns], old_m[kColumns], dw_[kColumns], dm_[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        old_w[j] = to_compute(w_[r][j]);
        old_m[j] = to_compute(m_[r][j]);
        const auto both = backward_of<kind>(Compute<P>(gradient[r][j]), old_w[j], old_m[j], gate_param);
        theta[r][j] = both.theta;
        dw_[j] = both.w;
        dm_[j] = both.m;
      }
      store_or_descend_chunk<kAligned, P, kInside>(dw, begin + column, begin + columns, old_w, dw_);
      store_or_descend_chunk<kAligned, M, kInside>(dm, begin + column, begin + columns, old_m, dm_);
    }
    if (dx != nullptr) product.template add_dx<kInside>(theta, rows_of_dy, step, batch, out);
  };
  int64_t step = first + warp * 4 * kRows;
  if (kAligned && first_column + kStrip <= in) {
    for (; step + 4 * kRows <= last; step += kWarps * 4 * kRows) add_step.template operator()<true>(step);
  }
  for (; step < last; step += kWarps * 4 * kRows) add_step.template operator()<false>(step);
  if (dx == nullptr) return;
  product.finish();
  add_warps(total, product);
  add_parts<kStrip * Product::kBatch>(
      split, blockIdx.x, blockIdx.y, gridDim.y, kStrip * batch, [&](int i) { return total[i / kStrip][i % kStrip]; },
      [&](int i, Sum sum) {
        const int64_t at = first_column + i % kStrip;
        if IN_BOUNDS (at < in) from_compute(sum, dx[int64_t(i / kStrip) * in + at]);
      });
}

}  // namespace metamask::cuda
