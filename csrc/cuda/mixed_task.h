// Mixed-task batches: the tasks' arrays, from torch's tensors to the form that kernels take.
#pragma once

#include <algorithm>

#include "cuda/kernels/segments.h"
#include "cuda/masked_weight.h"
#include "ops/task_masked_linear.h"

namespace metamask::cuda {

// Returns `arrays` in the form that kernels take. The table of a list lies in `table`, which must live as long as it is used.
inline PerTask per_task(const TaskArrays& arrays, const at::Tensor& on, at::Tensor& table) {
  if (!arrays.given()) return {};
  const auto begins_pack = [](const void* array) { return reinterpret_cast<uintptr_t>(array) % kPackBytes == 0; };
  if (arrays.stacked) {
    const bool packs = begins_pack(arrays.data(0)) && arrays.step() % kPackBytes == 0;
    return {const_cast<void*>(arrays.data(0)), arrays.step(), nullptr, packs};
  }
  std::vector<void*> pointers;
  pointers.reserve(arrays.tensors.size());
  for (const at::Tensor& tensor : arrays.tensors) pointers.push_back(const_cast<void*>(data("a mask", tensor)));
  const bool packs = std::all_of(pointers.begin(), pointers.end(), begins_pack);
  table = at::empty({int64_t(pointers.size())}, on.options().dtype(at::kLong));
  fill_table(pointers.data(), table.numel(), reinterpret_cast<void**>(mutable_data<int64_t>("table", table)),
             c10::cuda::getCurrentCUDAStream());
  return {nullptr, 0, reinterpret_cast<void* const*>(data<int64_t>("table", table)), packs};
}

}  // namespace metamask::cuda
