// Kernels with a bug planted in them, one at a time, for the emulator's own tests: each must be caught, and the correct kernel
// (kNone) must not be blamed. The bugs are those that such kernels really have.
#include "cuda/kernels/device.cuh"
#include "cuda/kernels/split_k.cuh"
#include "planted.h"

#include <cstring>
#include <utility>

#if defined(__CUDACC__)
#pragma nv_diag_suppress 549  // a variable used before its value is set: two of the bugs
#endif

namespace cuda_on_cpu {

using namespace metamask::cuda;

// out = 2 in, four elements a thread, then the tail one by one.
template <Bug bug>
__global__ void twice_kernel(float* __restrict__ out, const float* __restrict__ in, int64_t n) {
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, packs = n / 4;
  if (first < packs) {
    Pack<float, 4> pack = reinterpret_cast<const Pack<float, 4>*>(in)[first];
    for (int k = 0; k < 4; ++k) pack.value[k] *= 2;
    reinterpret_cast<Pack<float, 4>*>(out)[first] = pack;
  }
  const int64_t tail = packs * 4 + first;
  if (bug == Bug::kTailOffByOne ? tail <= n : tail < n) out[tail] = 2 * in[tail];
}

// out[r] = sum of row r of in [rows, columns]: one block of four warps a row.
template <Bug bug>
__global__ void row_sum_kernel(float* __restrict__ out, const float* __restrict__ in, int columns) {
  constexpr int kWarps = 4;
  SHARED(float, part, [kWarps]);
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  float sum;
  if (bug != Bug::kUninitialisedSum) sum = 0;
  for (int c = thread; c < columns; c += kWarps * 32) sum += in[int64_t(blockIdx.x) * columns + c];
  if (bug == Bug::kReturnBeforeShuffle && thread >= columns) return;
  for (int bits = 16; bits > 0; bits /= 2) {
    if (bug == Bug::kWrongLane) sum += __shfl_down_sync(~0u, sum, bits == 4 ? 5 : bits);
    else sum += __shfl_xor_sync(~0u, sum, bits);
  }
  if (lane == 0) part[bug == Bug::kPastSharedArray ? warp + 1 : warp] = sum;
  if (bug == Bug::kDivergentBarrier) {
    if (warp < 2) __syncthreads();
    else __syncthreads();
  } else if (bug != Bug::kNoBarrierBeforeRead) {
    __syncthreads();
  }
  if (thread == 0) {
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += part[w];
    out[bug == Bug::kBlocksWriteOneWord ? 0 : blockIdx.x] = total;
  }
}

// c [m, n] = a [m, k] b [k, n] in tiles of 16 x 16, an element a thread.
template <Bug bug>
__global__ void product_kernel(float* __restrict__ c, const float* __restrict__ a, const float* __restrict__ b, int m, int n,
                               int k) {
  constexpr int kTile = 16;
  SHARED(float, a_tile, [kTile][kTile]);
  SHARED(float, b_tile, [kTile][kTile]);
  const int x = int(threadIdx.x) % kTile, y = int(threadIdx.x) / kTile;
  const int row = int(blockIdx.y) * kTile + y, column = int(blockIdx.x) * kTile + x;
  float sum;
  if (bug != Bug::kUninitialisedAccumulator) sum = 0;
  for (int first = 0; first < k; first += kTile) {
    a_tile[y][x] = row < m && first + x < k ? a[int64_t(row) * k + first + x] : 0;
    const bool inside = bug == Bug::kColumnBeyondTheEnd ? column <= n : column < n;
    b_tile[y][x] = first + y < k && inside ? b[int64_t(first + y) * n + column] : 0;
    __syncthreads();
    for (int i = 0; i < kTile; ++i) sum += a_tile[y][i] * b_tile[i][x];
    if (bug != Bug::kNoBarrierBeforeWrite) __syncthreads();
  }
  if (row < m && column < n) c[int64_t(row) * n + column] = sum;
}

// out[r] = sum over i of in[i][r], in [count, 128]: two stages, filled by cp.async, each thread copying for its neighbour.
template <Bug bug>
__global__ void pipeline_kernel(float* __restrict__ out, const float* __restrict__ in, int count) {
  DYN_SHARED(float, stages);
  const int thread = int(threadIdx.x), other = (thread + 32) % 128;
  const auto fill = [&](int i) {
    cp_async<4>(stages + i % 2 * 128 + other, in + int64_t(i) * 128 + other, true);
    cp_async_commit();
  };
  float sum = 0;
  fill(0);
  for (int i = 0; i < count; ++i) {
    if (i + 1 < count) {
      fill(i + 1);
      if (bug != Bug::kNoAsyncWait) cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    if (bug != Bug::kNoBarrierAfterAsyncWait) __syncthreads();
    sum += stages[i % 2 * 128 + thread];
    if (bug != Bug::kNoBarrierInPipeline) __syncthreads();
  }
  out[thread] = sum;
}

// out[c] = sum over blocks of in[block][c], in [gridDim.x, 128]: the last block adds up what all have put into sums. Without a bug
// the ticket is that of the library's kernels.
template <Bug bug>
__global__ void last_block_kernel(float* out, const float* in, float* sums, unsigned long long* ticket) {
  SHARED(bool, last, [1]);
  const int thread = int(threadIdx.x);
  sums[blockIdx.x * 128 + thread] = in[blockIdx.x * 128 + thread];
  if (bug == Bug::kNone) {
    const bool mine = last_block(ticket, 1234567890123u, gridDim.x);
    if (thread == 0) last[0] = mine;
  } else if (bug != Bug::kNoBarrierBeforeTicket) {
    __syncthreads();
  }
  if (thread == 0 && bug != Bug::kNone) {
    if (bug != Bug::kNoFenceBeforeTicket) __threadfence();
    unsigned long long held = 0, was;
    if (bug == Bug::kTicketNotAtomic) {
      held = (*ticket)++;
    } else {
      while ((was = atomicCAS(ticket, held, held + 1)) != held) held = was;
    }
    if (bug != Bug::kNoFenceAfterTicket) __threadfence();
    last[0] = held + 1 == gridDim.x;
  }
  if (bug != Bug::kNoBarrierAfterTicket) __syncthreads();
  if (!last[0]) return;
  float sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += sums[block * 128 + thread];
  out[thread] = sum;
}

// One tile of the tensor cores: c [16, 8] = a [16, k] b [k, 8], k 8 (tf32) or 16 (two 16-bit numbers a register).
template <class Read, class Multiply>
__device__ void tile(float* out, Read read, Multiply mma) {
  const int lane = int(threadIdx.x), g = lane / 4, t = lane % 4;
  uint32_t a[4], b[2];
  float c[4] = {};
  read(g, t, a, b);
  mma(c, a, b);
  for (int i = 0; i < 4; ++i) out[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = c[i];
}

__global__ void tf32_tile_kernel(float* out, const float* a_, const float* b_) {
  tile(
      out,
      [&](int g, int t, uint32_t(&a)[4], uint32_t(&b)[2]) {
        for (int i = 0; i < 4; ++i) a[i] = to_tf32(a_[(g + 8 * (i % 2)) * 8 + t + 4 * (i / 2)]);
        for (int i = 0; i < 2; ++i) b[i] = to_tf32(b_[(t + 4 * i) * 8 + g]);
      },
      [](float(&c)[4], const uint32_t(&a)[4], const uint32_t(&b)[2]) { mma_tf32(c, a, b); });
}

template <class T>
__device__ uint32_t pair(float low, float high) {
  T values[2];
  from_compute(low, values[0]);
  from_compute(high, values[1]);
  uint32_t bits;
  memcpy(&bits, values, sizeof bits);
  return bits;
}

template <class T>
__global__ void tile_16_bit_kernel(float* out, const float* a_, const float* b_) {
  tile(
      out,
      [&](int g, int t, uint32_t(&a)[4], uint32_t(&b)[2]) {
        for (int i = 0; i < 4; ++i) {
          const float* from = a_ + (g + 8 * (i % 2)) * 16 + 2 * t + 8 * (i / 2);
          a[i] = pair<T>(from[0], from[1]);
        }
        for (int i = 0; i < 2; ++i) b[i] = pair<T>(b_[(2 * t + 8 * i) * 8 + g], b_[(2 * t + 8 * i + 1) * 8 + g]);
      },
      [](float(&c)[4], const uint32_t(&a)[4], const uint32_t(&b)[2]) { mma_16_bit<T>(c, a, b); });
}

template <Bug bug>
void run_with(Bug wanted, const Case& given) {
  if (wanted != bug) return;
  const auto [kernel, out, a, b, m, n, k] = given;
  const cudaStream_t stream = nullptr;
  switch (kernel) {
    case Kernel::kTwice: {
      // An array that starts one element in is only aligned to 4 bytes.
      const int64_t skip = bug == Bug::kMisaligned ? 1 : 0;
      launch(twice_kernel<bug>, dim3((n / 4 + 128) / 128), dim3(128), 0, stream, out + skip, a + skip, int64_t(n) - skip);
      break;
    }
    case Kernel::kRowSum: launch(row_sum_kernel<bug>, dim3(m), dim3(128), 0, stream, out, a, n); break;
    case Kernel::kProduct:
      launch(product_kernel<bug>, dim3((n + 15) / 16, (m + 15) / 16), dim3(256), 0, stream, out, a, b, m, n, k);
      break;
    case Kernel::kPipeline: launch(pipeline_kernel<bug>, dim3(1), dim3(128), 2 * 128 * sizeof(float), stream, out, a, k); break;
    case Kernel::kLastBlock: {
      // [m, 128], and the ticket. Twice with one key, as a CUDA graph does.
      float* sums = const_cast<float*>(b);
      for (int turn = 0; turn < 2; ++turn)
        launch(last_block_kernel<bug>, dim3(m), dim3(128), 0, stream, out, a, sums,
               reinterpret_cast<unsigned long long*>(sums + int64_t(m) * 128));
      break;
    }
    case Kernel::kTf32Tile: launch(tf32_tile_kernel, dim3(1), dim3(32), 0, stream, out, a, b); break;
    case Kernel::kBFloat16Tile: launch(tile_16_bit_kernel<__nv_bfloat16>, dim3(1), dim3(32), 0, stream, out, a, b); break;
    case Kernel::kFloat16Tile: launch(tile_16_bit_kernel<__half>, dim3(1), dim3(32), 0, stream, out, a, b); break;
  }
}

template <int... bugs>
void run_any(Bug wanted, const Case& given, std::integer_sequence<int, bugs...>) {
  (run_with<Bug(bugs)>(wanted, given), ...);
}

void run_planted(Bug bug, const Case& given) { run_any(bug, given, std::make_integer_sequence<int, int(Bug::kCount)>{}); }

}  // namespace cuda_on_cpu
