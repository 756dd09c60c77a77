// Mixed-task batches: the tasks' arrays, from torch's tensors to the form that kernels take.
#pragma once

#include "cuda/kernels/segments.h"
#include "cuda/masked_weight.h"
#include "ops/task_masked_linear.h"

namespace metamask::cuda {

// Returns `arrays` in the form that kernels take. The table of a list lies in `table`, which must live as long as it is used.
inline PerTask per_task(const TaskArrays& arrays, const at::Tensor& on, at::Tensor& table) {
  if (!arrays.given()) return {};
  if (arrays.stacked) return {const_cast<void*>(arrays.data(0)), arrays.step(), nullptr};
  std::vector<void*> pointers;
  pointers.reserve(arrays.tensors.size());
  for (const at::Tensor& tensor : arrays.tensors) pointers.push_back(const_cast<void*>(data("a mask", tensor)));
  table = at::empty({int64_t(pointers.size())}, on.options().dtype(at::kLong));
  fill_table(pointers.data(), table.numel(), reinterpret_cast<void**>(mutable_data<int64_t>("table", table)),
             c10::cuda::getCurrentCUDAStream());
  return {nullptr, 0, reinterpret_cast<void* const*>(data<int64_t>("table", table))};
}

}  // namespace metamask::cuda
