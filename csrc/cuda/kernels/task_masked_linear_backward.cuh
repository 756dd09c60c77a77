// The backward of task_masked_linear: masked_linear_backward.cuh does the same for one task. A block has a strip of columns of W
// and some of its rows, and takes the tasks in turn. G = dy^T x over all rows of a task exists only in accumulators; the mask's
// gradient is written from there. The task's part of dW is added to the sum of the tasks before it, by the same thread, in the
// order of the tasks. dx is made kTaskRoom rows at a time; rows of a task beyond the first ones compute its theta again.
#pragma once

#include "cuda/kernels/masked_linear_backward.cuh"
#include "cuda/kernels/task_masked_linear.cuh"

namespace metamask::cuda {

// dw: [out, in] of the type of the arithmetic; dm: of M; dx: [rows, groups * in]. What is null is not wanted. With `split_k_sums`
// [grid.y, rows, groups * in] the sums of dx go there instead.
//
// With kSecond they are the gradients of <cotangents, first derivatives>: V takes the place of theta, and H = dy^T (cotangent of
// dx) is a second gradient of theta, which reaches W and M as G does in the first backward.
template <bool kSecond, bool kAligned, class P, class M, class Product>
__global__ void __launch_bounds__(kBlock)
    task_masked_linear_backward_kernel(TaskSizes sizes, Compute<P> gate_param, TaskParameters given, TaskCotangents cotangents,
                                       const typename Product::X* dy, const typename Product::X* x, Compute<P>* dw, PerTask dm,
                                       typename Product::X* dx, typename Product::Sum* split_k_sums, int64_t rows_each, Grid grid) {
  using X = typename Product::X;
  using Sum = typename Product::Sum;
  constexpr int kRows = Product::kRows, kColumns = Product::kColumns, kStrip = 8 * kColumns;
  SHARED(Sum, total, [Product::kBatch][kStrip]);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const uint3 place = grid.place();
  const int64_t in = sizes.in, out = sizes.out, group = place.z, group_end = (group + 1) * sizes.group_out();
  const int64_t first_column = int64_t(place.x) * kStrip, column = first_column + kColumns * g;
  const int64_t first = group * sizes.group_out() + place.y * rows_each;
  const int64_t last = first + rows_each < group_end ? first + rows_each : group_end;
  const bool needs_dm = dm.first != nullptr || dm.table != nullptr, needs_gradient = dw != nullptr || needs_dm;
  const P *const w = static_cast<const P*>(given.w), *const a = static_cast<const P*>(cotangents.dw);
  const X* const ax = static_cast<const X*>(cotangents.dx);

  for (int64_t segment = 0, segment_end; segment < sizes.rows; segment = segment_end) {
    const int64_t task = sizes.task[segment];
    segment_end = sizes.end[segment];
    const M *const m = array_of<M>(given.masks, task), *const b = array_of<M>(cotangents.masks, task);
    M* const dm_of_task = array_of<M>(dm, task);
    for (int64_t begin = segment; begin < segment_end; begin += Product::kBatch) {
      const auto some_of = [&](int64_t from) {
        return int(segment_end - from < Product::kBatch ? segment_end - from : Product::kBatch);
      };
      const auto rows_of = [&](const X* of, int64_t from) {
        return Rows<X>{of + group * in, sizes.groups * in, sizes.source + from};
      };
      const auto dy_of = [&](int64_t from) { return Rows<X>{dy, out, sizes.source + from}; };
      const bool gradients = needs_gradient && begin == segment;
      if (!gradients && dx == nullptr) break;
      Product product;
      for (int64_t step = first + warp * 4 * kRows; step < last; step += kWarps * 4 * kRows) {
        Sum of_x[kRows][kColumns] = {}, of_ax[kRows][kColumns] = {}, theta[kRows][kColumns];
        for (int64_t from = begin; gradients && from < segment_end; from += Product::kBatch) {
          if (x != nullptr) {
            product.template start<kAligned>(rows_of(x, from), column, some_of(from), in);
            product.template gradient<kAligned>(dy_of(from), rows_of(x, from), column, step, some_of(from), group_end, in, of_x);
          }
          if constexpr (kSecond) {
            if (ax == nullptr) continue;
            product.template start<kAligned>(rows_of(ax, from), column, some_of(from), in);
            product.template gradient<kAligned>(dy_of(from), rows_of(ax, from), column, step, some_of(from), group_end, in, of_ax);
          }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int64_t row = step + kRows * t + r, start = row * in, columns = IN_BOUNDS(row < group_end) ? in : 0;
          Compute<P> w_[kColumns], m_[kColumns], a_[kColumns], b_[kColumns], dw_[kColumns], dm_[kColumns];
          load_chunk<kAligned>(w + start, column, columns, w_);
          load_chunk<kAligned>(m + start, column, columns, m_);
          if constexpr (kSecond) {
            load_chunk_or_zero<kAligned>(a + start, column, columns, a != nullptr, a_);
            load_chunk_or_zero<kAligned>(b + start, column, columns, b != nullptr, b_);
          }
          with_gate(sizes.gate, [&]<GateKind kind>() {
            for (int j = 0; j < kColumns; ++j) {
              const auto back = backward_of<kind>(kSecond ? of_ax[r][j] : of_x[r][j], w_[j], m_[j], gate_param);
              theta[r][j] = back.theta;
              dw_[j] = back.w;
              dm_[j] = back.m;
              if constexpr (kSecond) {
                const auto again = double_backward_of<kind>(a_[j], b_[j], of_x[r][j], w_[j], m_[j], gate_param);
                theta[r][j] = again.g;
                dw_[j] += again.w;
                dm_[j] += again.m;
              }
            }
          });
          if (!gradients) continue;
          store_chunk<kAligned>(dw, start + column, start + columns, segment > 0, dw_);
          store_chunk<kAligned>(dm_of_task, start + column, start + columns, false, dm_);
        }
        if (dx != nullptr) product.add_dx(theta, dy_of(begin), step, some_of(begin), group_end);
      }
      if (dx == nullptr) break;
      product.finish();
      add_warps(total, product);
      for (int i = int(threadIdx.x); i < kStrip * some_of(begin); i += kBlock) {
        const int64_t at = first_column + i % kStrip;
        if (!IN_BOUNDS(at < in)) continue;
        const Sum sum = total[i / kStrip][i % kStrip];
        const int64_t to = (sizes.source[begin + i / kStrip] * sizes.groups + group) * in + at;
        if (split_k_sums != nullptr) split_k_sums[int64_t(place.y) * sizes.rows * sizes.groups * in + to] = sum;
        else from_compute(sum, dx[to]);
      }
      __syncthreads();  // the next rows' sums take the place of these
    }
  }
}

}  // namespace metamask::cuda
