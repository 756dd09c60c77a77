// The device API that kernels are written against. Under nvcc it is CUDA; under a host compiler (tests/cuda_on_cpu) a launch runs
// the kernel's own source thread after thread, which is enough while no kernel has a barrier.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "../types.h"

#if !defined(__CUDACC__)
#undef __global__
#define __global__
struct HostIndex {
  unsigned x, y, z;
};
inline thread_local HostIndex blockIdx, threadIdx;
#endif

namespace metamask::cuda {

constexpr int kThreads = 256;
constexpr int kPackBytes = 16;  // the widest load and store

template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T value[N];
};

// Guards an access; written so that a script can find and remove each one, to see whether a test notices.
#define IN_BOUNDS(...) (__VA_ARGS__)

METAMASK_INLINE double to_compute(double x) { return x; }
METAMASK_INLINE float to_compute(float x) { return x; }
METAMASK_INLINE float to_compute(__nv_bfloat16 x) { return __bfloat162float(x); }
METAMASK_INLINE float to_compute(__half x) { return __half2float(x); }

METAMASK_INLINE void from_compute(double x, double& out) { out = x; }
METAMASK_INLINE void from_compute(float x, float& out) { out = x; }
METAMASK_INLINE void from_compute(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
METAMASK_INLINE void from_compute(float x, __half& out) { out = __float2half_rn(x); }

template <class T>
using Compute = decltype(to_compute(T{}));

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream, Arguments... arguments) {
#if defined(__CUDACC__)
  kernel<<<dim3(static_cast<unsigned>(blocks)), dim3(threads), 0, stream>>>(arguments...);
#else
  (void)stream;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int thread = 0; thread < threads; ++thread) {
      blockIdx = {static_cast<unsigned>(block), 0, 0};
      threadIdx = {static_cast<unsigned>(thread), 0, 0};
      kernel(arguments...);
    }
  }
#endif
}

}  // namespace metamask::cuda
