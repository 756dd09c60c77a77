// task_masked_linear: y_b = x_b theta_t^T with theta_t = W g(M_t), where t is the task of row b. The rows are sorted by task
// (segments.cu), and theta of a task exists only in registers. The floor is the bytes of W and of the masks of the batch's tasks.
//
// A block makes 16 outputs of kTaskRoom sorted rows, as masked_linear.cuh does for a whole small batch: a step's tile of W is
// loaded once, and becomes the theta of each task of these rows in turn. Blocks that differ only in their rows run side by side, so
// that W, and the mask of a task with more rows, come from memory once.
#pragma once

#include "cuda/kernels/grid.cuh"
#include "cuda/kernels/masked_linear.cuh"
#include "cuda/kernels/segments.cuh"
#include "cuda/kernels/task_masked_linear.h"

namespace metamask::cuda {

constexpr int kTaskRoom = 16;

// The part of a TaskLinearCase that the kernels take.
struct TaskSizes {
  GateKind gate;
  Type bias_mask;
  int64_t rows, groups, out, in, tiles;  // tiles: of a group's rows of W
  const int64_t *source, *task, *end;    // of SortedRows

  DEVICE_INLINE int64_t group_out() const { return out / groups; }
};

// Calls run.operator()<gate>(): one branch for many elements, instead of a kernel for each gate.
template <class Run>
DEVICE_INLINE void with_gate(GateKind kind, Run run) {
  if (kind == kSigmoid) run.template operator()<kSigmoid>();
  else if (kind == kIdentity) run.template operator()<kIdentity>();
  else run.template operator()<kHard>();
}

template <bool kAligned, int N, class T>
DEVICE_INLINE void load_chunk_or_zero(const T* __restrict__ row, int64_t column, int64_t columns, bool there, Compute<T> (&to)[N]) {
  if (there) {
    load_chunk<kAligned>(row, column, columns, to);
  } else {
    for (int j = 0; j < N; ++j) to[j] = 0;
  }
}

template <class P>
DEVICE_INLINE Compute<P> bias_of(const TaskSizes& sizes, Compute<P> gate_param, const P* bias, const PerTask& bias_masks,
                                 int64_t task, int64_t row) {
  if (bias == nullptr) return 0;
  const Compute<P> b = to_compute(bias[row]);
  if (array_of<P>(bias_masks, task) == nullptr) return b;
  // float32, or the type of the bias: one number for each output, which needs no kernel of its own.
  const bool wide = sizes.bias_mask == Type::kFloat32;
  const Compute<P> m = wide ? Compute<P>(array_of<float>(bias_masks, task)[row]) : to_compute(array_of<P>(bias_masks, task)[row]);
  if (sizes.gate == kIdentity) return theta_of<kIdentity>(b, m, gate_param);
  return sizes.gate == kSigmoid ? theta_of<kSigmoid>(b, m, gate_param) : theta_of<kHard>(b, m, gate_param);
}

// What a block's rows need of their tasks at each step, by the number of the row in its window: looked up once.
template <class M>
struct TaskWindow {
  int64_t source[kTaskRoom];  // the row in the batch
  int end[kTaskRoom];         // of the rows of its task
  const M *m[kTaskRoom], *dm[kTaskRoom];

  DEVICE_INLINE void find(const TaskSizes& sizes, const PerTask& masks, const PerTask& cotangents, int64_t window, int count) {
    const int i = int(threadIdx.x);
    if IN_BOUNDS (i < count) {
      const int64_t task = sizes.task[window + i], left = sizes.end[window + i] - window;
      source[i] = sizes.source[window + i];
      end[i] = left < count ? int(left) : count;
      m[i] = array_of<M>(masks, task);
      dm[i] = array_of<M>(cotangents, task);
    }
    __syncthreads();
  }
};

// With kSecond y is the gradient for dy of <cotangents, first derivatives>: theta meets the cotangent of dx, and what the
// cotangents of dW and dM make of W and M (V = A s + B W d) meets x. x or the cotangent of dx may be null then. With `split_k_sums`
// [grid.z, rows, out] the sums go there instead.
template <bool kSecond, bool kAligned, class P, class M, class Product>
__global__ void __launch_bounds__(kBlock, !kSecond && sizeof(typename Product::Sum) == 4 ? 2 : 1)
    task_masked_linear_kernel(TaskSizes sizes, Compute<P> gate_param, TaskParameters given, TaskCotangents cotangents,
                              const typename Product::X* x, typename Product::X* y, typename Product::Sum* split_k_sums,
                              int64_t columns_each, Grid grid) {
  using X = typename Product::X;
  using Sum = typename Product::Sum;
  SHARED(Sum, total, [kRowsOfTile][Product::kBatch]);
  SHARED(TaskWindow<M>, tasks, [1]);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const uint3 place = grid.place();
  const int64_t in = sizes.in, group_out = sizes.group_out(), group = place.y / sizes.tiles;
  const int64_t first_row = group * group_out + place.y % sizes.tiles * kRowsOfTile, end_row = (group + 1) * group_out;
  const int64_t window = int64_t(place.x) * kTaskRoom;
  const int count = int(sizes.rows - window < kTaskRoom ? sizes.rows - window : kTaskRoom);
  const int64_t first = place.z * columns_each, last = first + columns_each < in ? first + columns_each : in;
  const P *const w = static_cast<const P*>(given.w), *const dw = static_cast<const P*>(cotangents.dw);
  const X* const ax = static_cast<const X*>(cotangents.dx);
  tasks[0].find(sizes, given.masks, cotangents.masks, window, count);
  int64_t begins[2];
  for (int r = 0; r < 2; ++r) {
    // Instead of a row beyond the last one the last one is computed again, for nobody.
    const int64_t row = first_row + g + 8 * r;
    begins[r] = (IN_BOUNDS(row < end_row) ? row : end_row - 1) * in;
  }
  constexpr bool kAhead = kAligned && !kSecond && sizeof(Sum) == 4;  // else there are no registers for it
  Product product;
  for (int64_t step = first + warp * kColumnsOfStep; step < last; step += kWarps * kColumnsOfStep) {
    const int64_t column = step + kChunk * t;
    // A compiler would find all rows before the first step, and keep them in registers that it does not have.
    const int64_t* const source = kept(tasks[0].source);
    const Rows<X> rows_of_x{x + group * in, sizes.groups * in, source}, rows_of_ax{ax + group * in, sizes.groups * in, source};
    const auto load_tile = [&]<class T>(const T* from, T(&to)[2][kChunk]) {
#pragma unroll
      for (int r = 0; r < 2; ++r) load_raw<kAligned>(from + begins[r], column, in, to[r]);
    };
    P w_[2][kChunk];
    M next[2][kChunk];
    load_tile(w, w_);
    if constexpr (kAhead) load_tile(tasks[0].m[0], next);  // before anything waits for w_
    for (int begin = 0, end; begin < count; begin = end) {
      end = tasks[0].end[begin];
      M m_[2][kChunk];
      if constexpr (kAhead) {
        memcpy(m_, next, sizeof m_);
        if (end < count) load_tile(tasks[0].m[end], next);
      } else {
        load_tile(tasks[0].m[begin], m_);
      }
      const auto add = [&](const Rows<X>& rows, auto fill) {
        Sum tile[2][kChunk];
#pragma unroll
        for (int r = 0; r < 2; ++r) fill(r, tile[r]);
        product.template add<kAligned, false>(tile, rows, column, begin, end, in);
      };
      const auto theta = [&](int r, Sum(&to)[kChunk]) {
        with_gate(sizes.gate, [&]<GateKind kind>() {
#pragma unroll
          for (int j = 0; j < kChunk; ++j) to[j] = theta_of<kind>(to_compute(w_[r][j]), to_compute(m_[r][j]), gate_param);
        });
      };
      if constexpr (kSecond) {
        const M* const dm = tasks[0].dm[begin];
        if (ax != nullptr) add(rows_of_ax, theta);
        const auto second = [&](int r, Sum(&to)[kChunk]) {
          Compute<P> a_[kChunk], b_[kChunk];
          load_chunk_or_zero<kAligned>(dw + begins[r], column, in, dw != nullptr, a_);
          load_chunk_or_zero<kAligned>(dm + begins[r], column, in, dm != nullptr, b_);
          with_gate(sizes.gate, [&]<GateKind kind>() {
#pragma unroll
            for (int j = 0; j < kChunk; ++j) {
              to[j] = double_backward_of<kind>(a_[j], b_[j], Sum(0), to_compute(w_[r][j]), to_compute(m_[r][j]), gate_param).g;
            }
          });
        };
        if (x != nullptr) add(rows_of_x, second);
      } else {
        add(rows_of_x, theta);
      }
    }
  }
  product.finish();
  add_warps(total, product);
  for (int i = int(threadIdx.x); i < kRowsOfTile * count; i += kBlock) {
    const int b = i / kRowsOfTile;
    const int64_t row = first_row + i % kRowsOfTile;
    if (!IN_BOUNDS(row < end_row)) continue;
    Sum sum = total[i % kRowsOfTile][b];
    if (place.z == 0) {
      sum += bias_of<P>(sizes, gate_param, static_cast<const P*>(given.bias), given.bias_masks, sizes.task[window + b], row);
    }
    const int64_t to = tasks[0].source[b] * sizes.out + row;
    if (split_k_sums != nullptr) split_k_sums[int64_t(place.z) * sizes.rows * sizes.out + to] = sum;
    else from_compute(sum, y[to]);
  }
}

}  // namespace metamask::cuda
