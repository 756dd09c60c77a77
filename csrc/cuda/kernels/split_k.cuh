// Split-K: several blocks share the sums of a tile, and the last one to finish adds up their parts, in the order of the parts: the
// numbers are the same every time. No second kernel waits for the first.
#pragma once

#include "cuda/kernels/launch.cuh"

namespace metamask::cuda {

// What blocks that share sums need in memory. Nothing has to be cleared before a launch, so that a CUDA graph can repeat it, and
// none shares it with another: a ticket counts from `key`, which memory holds by chance once in 2^56 times, and is 0 in the end.
template <class Sum>
struct SplitK {
  unsigned long long* tickets = nullptr;  // of each tile; null: a tile is one block's
  Sum* parts = nullptr;                   // [tiles, gridDim's count, room]
  unsigned long long key = 0;

  static int64_t bytes_of_tickets(int64_t tiles) { return ceil_div(tiles, 2) * 16; }

  // The bytes of the workspace, for `room` sums of each tile.
  static int64_t bytes(int64_t tiles, int64_t count, int64_t room) {
    return count > 1 ? bytes_of_tickets(tiles) + tiles * count * room * int64_t(sizeof(Sum)) : 0;
  }

  static SplitK in(void* workspace, int64_t tiles, int64_t count) {
    if (count < 2) return {};
    char* const begin = static_cast<char*>(workspace);
    return {reinterpret_cast<unsigned long long*>(begin), reinterpret_cast<Sum*>(begin + bytes_of_tickets(tiles)), new_key()};
  }
};

// Returns, to every thread of the block, whether this is the last of `count` blocks that come here for a tile. Then it sees what
// the others have stored before.
DEVICE_INLINE bool last_block(unsigned long long* ticket, unsigned long long key, unsigned count) {
  SHARED(bool, last, [1]);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    unsigned long long held = 0;
    for (;;) {
      const unsigned long long before = held - key < count ? held - key : 0;  // the blocks that have been here
      last[0] = before + 1 == count;
      const unsigned long long was = atomicCAS(ticket, held, last[0] ? 0 : key + before + 1);
      if (was == held) break;
      held = was;
    }
    __threadfence();
  }
  __syncthreads();
  return last[0];
}

// Calls store(i, sum) for each of `n` sums, of which this block, number `part` of `count`, has own(i). The last block of a tile
// calls it with the sums over all of them.
template <int kRoom, class Sum, class Own, class Store>
DEVICE_INLINE void add_parts(const SplitK<Sum>& split, int64_t tile, unsigned part, unsigned count, int n, Own own, Store store) {
  if (split.tickets == nullptr) {
    for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) store(i, own(i));
    return;
  }
  Sum* const parts = split.parts + tile * count * kRoom;
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) parts[int64_t(part) * kRoom + i] = own(i);
  if (!last_block(split.tickets + tile, split.key, count)) return;
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) {
    Sum sum = 0;
#pragma unroll 8
    for (unsigned k = 0; k < count; ++k) sum += parts[int64_t(k) * kRoom + i];
    store(i, sum);
  }
}

// For kernels that do not do so yet: a second one adds up.
//
// result [rows, columns] = the sum over `count` of split_k_sums [count, rows, columns] (+ bias [columns]), n = rows * columns
template <class X, class Sum>
__global__ void __launch_bounds__(kThreads)
    add_split_k_kernel(const Sum* split_k_sums, const X* bias, X* result, int count, int64_t n, int64_t columns) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (!IN_BOUNDS(i < n)) return;
  Sum sum = 0;
  for (int part = 0; part < count; ++part) sum += split_k_sums[part * n + i];
  if (bias != nullptr) sum += to_compute(bias[i % columns]);
  from_compute(sum, result[i]);
}

template <class X, class Sum>
void add_split_k(const Sum* split_k_sums, const void* bias, void* result, int count, int64_t rows, int64_t columns,
                 cudaStream_t stream) {
  const int64_t n = rows * columns;
  launch(add_split_k_kernel<X, Sum>, grid_of(ceil_div(n, kThreads)), dim3(kThreads), 0, stream, split_k_sums, in<X>(bias),
         out<X>(result), count, n, columns);
}

}  // namespace metamask::cuda
