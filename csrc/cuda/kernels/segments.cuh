// The tasks' arrays inside kernels.
#pragma once

#include "cuda/kernels/device.cuh"
#include "cuda/kernels/segments.h"

namespace metamask::cuda {

// Returns the array of one task; null if there is none.
template <class T>
DEVICE_INLINE T* array_of(const PerTask& arrays, int64_t task) {
  void* const array = arrays.table != nullptr ? arrays.table[task] : static_cast<char*>(arrays.first) + task * arrays.stride;
  return static_cast<T*>(arrays.first == nullptr && arrays.table == nullptr ? nullptr : array);
}

}  // namespace metamask::cuda
