// A grid of three dimensions laid into the first one, of which a device takes 2^31 - 1 blocks: of the others it takes 65,535.
#pragma once

#include "cuda/kernels/launch.cuh"

namespace metamask::cuda {

// Blocks that differ only in x run side by side.
struct Grid {
  unsigned x, y, z;

  Grid(int64_t x_blocks, int64_t y_blocks, int64_t z_blocks)
      : x(unsigned(grid_of(x_blocks).x)), y(grid_of(x_blocks * y_blocks).x / x), z(grid_of(int64_t(x) * y * z_blocks).x / x / y) {}

  dim3 blocks() const { return dim3(x * y * z); }

  // Returns the place of the running block.
  DEVICE_INLINE uint3 place() const { return {blockIdx.x % x, blockIdx.x / x % y, blockIdx.x / x / y}; }
};

}  // namespace metamask::cuda
