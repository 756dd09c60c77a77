// Launchers for the rows of a mixed-task batch, on raw device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/types.h"

namespace metamask::cuda {

// One array for each task: parts of one array, `stride` bytes apart, or entries of a table in device memory. With neither there are
// no arrays.
struct PerTask {
  void* first = nullptr;
  int64_t stride = 0;
  void* const* table = nullptr;
  bool packs = true;  // each array begins at a multiple of kPackBytes
};

// The rows of a batch, the tasks in ascending order: for row i, its row in the batch, its task, and the end of its task's rows.
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

// Zeroes the arrays [n] of the tasks that have no rows.
void clear_unused(Type type, const PerTask& arrays, int64_t tasks, const int64_t* used, int64_t n, cudaStream_t stream);

}  // namespace metamask::cuda
