// Launchers for the rows of a batch that mixes tasks, on raw device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/types.h"

namespace metamask::cuda {

// An array of each task: parts of one, `stride` bytes apart, or by a table in device memory. Neither: there are none.
struct PerTask {
  void* first = nullptr;
  int64_t stride = 0;
  void* const* table = nullptr;
};

// The rows of a batch, the tasks in ascending order: of row i, where it comes from, its task, and where its task's rows end.
struct SortedRows {
  int64_t samples, rows_per_sample, tasks_count;
  int64_t *source, *task, *end;

  int64_t rows() const { return samples * rows_per_sample; }
};

constexpr int kPointersAtOnce = 256;

struct PointerBatch {
  void* at[kPointersAtOnce];
};

// slots: [samples], each below tasks_count, or the device asserts. used [tasks_count]: zeros, which become 1 for the tasks that
// have rows.
void sort_by_task(const int64_t* slots, const SortedRows& sorted, int64_t* used, cudaStream_t stream);

// Copies `count` pointers from the host into the table.
void fill_table(void* const* pointers, int64_t count, void** table, cudaStream_t stream);

// Zeros in the arrays [n] of the tasks that have no rows.
void clear_unused(Type type, const PerTask& arrays, int64_t tasks, const int64_t* used, int64_t n, cudaStream_t stream);

}  // namespace metamask::cuda
