// What the kernels of the ops on packed masks share: the sizes of a call, and where the bits of a sample's mask are.
#pragma once

#include "cuda/kernels/segments.cuh"

namespace metamask::cuda {

struct PackedSizes {
  int64_t rows, rows_per_sample, groups, out, in, tasks;

  DEVICE_INLINE int64_t group_out() const { return out / groups; }
  DEVICE_INLINE int64_t row_bytes() const { return (in + 7) / 8; }
};

DEVICE_INLINE const uint8_t* bits_of(const PerTask& bits, const PackedSizes& sizes, const int64_t* slots, int64_t sample) {
  const int64_t task = slots[sample];
  DEVICE_ASSERT(task >= 0 && task < sizes.tasks);
  return array_of<const uint8_t>(bits, task);
}

}  // namespace metamask::cuda
