// Sorts the rows of a mixed-task batch by task, and makes tables of the tasks' arrays. All of it happens on the device: no number
// has to come back to the host, so that a CUDA graph can hold it.
#include "cuda/kernels/segments.h"

#include <cstring>

#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/segments.cuh"

namespace metamask::cuda {
namespace {

// A thread finds the place of one sample: behind those of lower tasks, and those of its task that come before it. That is B
// comparisons for each of B samples, which the GPU does in less time than the passes of a sort take to start.
__global__ void __launch_bounds__(kThreads) sort_by_task_kernel(const int64_t* slots, SortedRows sorted, int64_t* used) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (!IN_BOUNDS(i < sorted.samples)) return;
  const int64_t task = slots[i];
  DEVICE_ASSERT(task >= 0 && task < sorted.tasks_count);
  int64_t lower = 0, before = 0, same = 0;
  for (int64_t j = 0; j < sorted.samples; ++j) {
    const int64_t other = slots[j];
    lower += other < task;
    same += other == task;
    before += other == task && j < i;
  }
  const int64_t each = sorted.rows_per_sample, place = (lower + before) * each;
  if (before == 0 && each > 0) used[task] = 1;
  for (int64_t r = 0; r < each; ++r) {
    sorted.source[place + r] = i * each + r;
    sorted.task[place + r] = task;
    sorted.end[place + r] = (lower + same) * each;
  }
}

// The pointers arrive as an argument: a copy from the host's memory would outlive it in a CUDA graph.
__global__ void __launch_bounds__(kThreads) fill_table_kernel(PointerBatch pointers, void** table, int count) {
  const int i = int(threadIdx.x);
  if (IN_BOUNDS(i < count)) table[i] = pointers.at[i];
}

// Zeroes the arrays of the tasks that no row has; a row of blocks for each task.
template <class P>
__global__ void __launch_bounds__(kThreads)
    clear_unused_kernel(PerTask arrays, const int64_t* used, int64_t n, int64_t blocks_each) {
  const int64_t task = blockIdx.x / blocks_each;
  if (used[task] != 0) return;
  const int64_t first = int64_t(blockIdx.x) % blocks_each * kThreads + threadIdx.x;
  P* const array = array_of<P>(arrays, task);
  for (int64_t i = first; IN_BOUNDS(i < n); i += blocks_each * kThreads) array[i] = P(0.0f);
}

}  // namespace

void sort_by_task(const int64_t* slots, const SortedRows& sorted, int64_t* used, cudaStream_t stream) {
  if (sorted.samples == 0) return;
  launch(sort_by_task_kernel, grid_of(ceil_div(sorted.samples, kThreads)), dim3(kThreads), 0, stream, slots, sorted, used);
}

void fill_table(void* const* pointers, int64_t count, void** table, cudaStream_t stream) {
  static_assert(kPointersAtOnce == kThreads);
  for (int64_t first = 0; first < count; first += kPointersAtOnce) {
    const int64_t some = count - first < kPointersAtOnce ? count - first : kPointersAtOnce;
    PointerBatch batch{};
    std::memcpy(batch.at, pointers + first, size_t(some) * sizeof(void*));
    launch(fill_table_kernel, dim3(1), dim3(kThreads), 0, stream, batch, table + first, int(some));
  }
}

void clear_unused(Type type, const PerTask& arrays, int64_t tasks, const int64_t* used, int64_t n, cudaStream_t stream) {
  if (tasks == 0 || n == 0) return;
  constexpr int64_t kMost = 64;  // blocks for a task: most tasks have rows, and their blocks end at once
  const int64_t blocks = ceil_div(n, kThreads), each = blocks < kMost ? blocks : kMost;
  with_type(type, [&]<class P>(Tag<P>) {
    launch(clear_unused_kernel<P>, grid_of(tasks * each), dim3(kThreads), 0, stream, arrays, used, n, each);
  });
}

}  // namespace metamask::cuda
