// The device API that kernels are written against. Under nvcc it is CUDA, and all inline PTX is here; a host compiler takes the
// emulator's side instead (tests/emulator), which runs the kernels' own source on the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/types.h"

#if defined(__CUDACC__)

#include <atomic>
#include <cassert>
#include <random>
// <cassert> declares it only without NDEBUG.
extern "C" __host__ __device__ void __assert_fail(const char*, const char*, unsigned, const char*) noexcept;

#define DEVICE_INLINE __device__ __forceinline__

// SHARED(float, tile, [16][33]) declares an array that the block shares; DYN_SHARED(float, name) is the memory whose size the
// launch gives. The emulator has its own, and refuses __shared__.
#define SHARED(T, name, ...) __shared__ __align__(16) T name __VA_ARGS__
#define DYN_SHARED(T, name)                                              \
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[]; \
  T* name = reinterpret_cast<T*>(dynamic_shared_memory)

namespace metamask::cuda {

// Arguments are converted to the kernel's parameters. A failed launch is left as CUDA's last error, which the caller checks.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Arguments... arguments) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)) != cudaSuccess) {
    return;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
}

// Ends the kernel, and every later use of the device's context fails, as after a device assert of torch's own. (assert() itself
// does nothing in a release build.)
#define DEVICE_ASSERT(...) ((__VA_ARGS__) ? static_cast<void>(0) : __assert_fail(#__VA_ARGS__, __FILE__, __LINE__, __func__))

// Returns the number of multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// A number that was not there before, as far as 64 bits go: those of one process are far from each other, and begin anywhere.
inline unsigned long long new_key() {
  static std::atomic<unsigned long long> last = [] {
    std::random_device random;
    return static_cast<unsigned long long>(random()) << 32 | random();
  }();
  return last.fetch_add(0x9e3779b97f4a7c15u);
}

// 1 / x to within one unit in the last place; what is subnormal, argument or result, counts as zero.
METAMASK_INLINE float approximate_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(r) : "f"(x));
  return r;
#else
  return 1.0f / x;
#endif
}

// Stores kBytes (1, 2, 4, 8 or 16) at an address aligned to kBytes, in one access. (A compiler may split the plain assignment of
// an array.)
template <int kBytes>
DEVICE_INLINE void store_bytes(void* to, const void* from) {
  if constexpr (kBytes == 16) {
    uint4 bits;
    memcpy(&bits, from, sizeof bits);
    __stwb(static_cast<uint4*>(to), bits);
  } else if constexpr (kBytes == 8) {
    uint2 bits;
    memcpy(&bits, from, sizeof bits);
    __stwb(static_cast<uint2*>(to), bits);
  } else {
    static_assert(kBytes <= 4);
    memcpy(__builtin_assume_aligned(to, kBytes), from, kBytes);
  }
}

// sum += a b if one of the bits of `mask` is set in `bits`. (Of the plain condition a compiler makes two operations for some bits:
// a remainder, a sign. Of this one it takes the predicates for seven bits of a byte from one.)
DEVICE_INLINE void multiply_add_if(uint32_t bits, uint32_t mask, float a, float b, float& sum) {
  asm("{\n.reg .pred on;\n.reg .b32 bit;\nand.b32 bit, %1, %2;\nsetp.ne.u32 on, bit, 0;\n@on fma.rn.f32 %0, %3, %4, %0;\n}\n"
      : "+f"(sum)
      : "r"(bits), "r"(mask), "f"(a), "f"(b));
}
DEVICE_INLINE void multiply_add_if(uint32_t bits, uint32_t mask, double a, double b, double& sum) {
  asm("{\n.reg .pred on;\n.reg .b32 bit;\nand.b32 bit, %1, %2;\nsetp.ne.u32 on, bit, 0;\n@on fma.rn.f64 %0, %3, %4, %0;\n}\n"
      : "+d"(sum)
      : "r"(bits), "r"(mask), "d"(a), "d"(b));
}

// The bits of a where `mask` has ones, those of b elsewhere, in one operation.
DEVICE_INLINE uint32_t merge_bits(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t merged;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;\n" : "=r"(merged) : "r"(mask), "r"(a), "r"(b));
  return merged;
}

// The same value, which the compiler keeps in a register instead of computing it again at each use. All lanes call it.
DEVICE_INLINE int64_t kept(int64_t value) { return __shfl_sync(~0u, value, int(threadIdx.x) % 32); }
// A pointer into shared memory.
template <class T>
DEVICE_INLINE T* kept(T* pointer) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(pointer));
  return static_cast<T*>(__cvta_shared_to_generic(__shfl_sync(~0u, address, int(threadIdx.x) % 32)));
}

// Copies kBytes (4, 8 or 16) from global to shared memory without waiting; zeros where !valid. Both addresses are aligned to
// kBytes.
template <int kBytes>
DEVICE_INLINE void cp_async(void* to, const void* from, bool valid) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int read = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(from), "r"(read) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;\n" ::"r"(shared), "l"(from), "r"(read), "n"(kBytes) : "memory");
  }
}

// Makes a group of this thread's copies since the last commit.
DEVICE_INLINE void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most kGroupsLeft of this thread's groups, the newest, are unfinished. Other threads see the data after a barrier.
template <int kGroupsLeft>
DEVICE_INLINE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroupsLeft) : "memory");
}

// x rounded to tf32 (10 bits of mantissa), as the bits that mma_tf32 takes.
DEVICE_INLINE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(x));
  return bits;
}

// c[16, 8] += a[16, 8] b[8, 8] over a warp, in tensor cores; fragments as in the PTX ISA for mma.m16n8k8. With g = lane / 4 and
// t = lane % 4: a[i] is A[g + 8 (i % 2)][t + 4 (i / 2)], b[i] is B[t + 4 i][g], c[i] is C[g + 8 (i / 2)][2 t + i % 2].
DEVICE_INLINE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c[16, 8] += a[16, 16] b[16, 8] for T __nv_bfloat16 or __half, two factors a register (the lower column of A, row of B, in the low
// half): a[i] holds A[g + 8 (i % 2)][2 t + 8 (i / 2) + {0, 1}], b[i] holds B[2 t + 8 i + {0, 1}][g]; c as for mma_tf32.
template <class T>
DEVICE_INLINE void mma_16_bit(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
DEVICE_INLINE void mma_16_bit<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
DEVICE_INLINE void mma_16_bit<__half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace metamask::cuda

#else
#include "emulator/device.h"
#endif

// Guards an access; written so that a script can find and remove each one, to see whether a test notices (tools/mutate.py).
#define IN_BOUNDS(...) (__VA_ARGS__)

namespace metamask {

// One step of Newton's method, instead of the call that a division is. x is finite, so that nothing becomes inf * 0.
template <>
struct Reciprocal<float> {
  METAMASK_INLINE static float of(float x) {
    const float r = cuda::approximate_reciprocal(x);
    return fmaf(r, fmaf(-x, r, 1.0f), r);
  }
};

}  // namespace metamask

namespace metamask::cuda {

constexpr int kThreads = 256;

template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T value[N];
};

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

}  // namespace metamask::cuda
