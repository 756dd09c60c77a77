// What a kernel sees when it is compiled for the CPU, in place of CUDA's language and of the inline assembly in
// csrc/cuda/kernels/device.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "atomics.h"
#include "device_index.h"
#include "scheduler.h"
#include "shared.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__
#define DEVICE_INLINE METAMASK_INLINE
// Only a SHARED array is one for the whole block.
#define __shared__ static_assert(false, "declare it as SHARED(type, name, [size])");

#define SHARED(T, name, ...)                               \
  using name##_type = std::type_identity_t<T __VA_ARGS__>; \
  static const char name##_key = 0;                        \
  name##_type& name = *static_cast<name##_type*>(cuda_on_cpu::shared_array(&name##_key, sizeof(name##_type), #name))
#define DYN_SHARED(T, name) T* name = static_cast<T*>(cuda_on_cpu::dynamic_shared_memory())

#define DEVICE_ASSERT(...) ((__VA_ARGS__) ? static_cast<void>(0) : cuda_on_cpu::fail_assertion(#__VA_ARGS__))

inline void __syncthreads(cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) { cuda_on_cpu::wait_at_barrier(where); }

inline void __syncwarp(unsigned mask = ~0u, cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  cuda_on_cpu::sync_warp(mask, where);
}

inline void __threadfence() { cuda_on_cpu::fence(); }

inline unsigned long long atomicCAS(unsigned long long* at, unsigned long long expected, unsigned long long desired) {
  return cuda_on_cpu::compare_and_swap(at, expected, desired);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  return cuda_on_cpu::shuffle(mask, value, source % 32, "__shfl_sync", where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::current_lane() ^ bits, "__shfl_xor_sync", where);
}

// Beyond the last lane a lane gets its own value.
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  const int lane = cuda_on_cpu::current_lane(), source = lane + int(distance);
  return cuda_on_cpu::shuffle(mask, value, source < 32 ? source : lane, "__shfl_down_sync", where);
}

inline int __all_sync(unsigned mask, int predicate, cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  return cuda_on_cpu::all_of_warp(mask, predicate, where);
}

// The low word of high:low, shifted right by as many bits as the low five bits of `bits` say.
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned bits) {
  return unsigned((uint64_t(high) << 32 | low) >> (bits & 31));
}

namespace metamask::cuda {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, Arguments... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } call{kernel, {arguments...}};
  const auto entry = [](const void* p) {
    const Call& called = *static_cast<const Call*>(p);
    std::apply(called.kernel, called.arguments);
  };
  cuda_on_cpu::run({reinterpret_cast<void*>(kernel), grid, block, shared_bytes, entry, &call, sizeof call});
}

// Few: a test's small layers are shared out among blocks too.
inline int multiprocessors() { return 2; }

inline unsigned long long new_key() { return 0x9e3779b97f4a7c15u * (cuda_on_cpu::launches() + 1); }

// One unit in the last place off, up or down, as the device's may be.
inline float approximate_reciprocal(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const float exact = 1.0f / x;
  return exact == 0 || !std::isfinite(exact) ? exact : std::nextafter(exact, bits % 2 == 0 ? 0.0f : 2 * exact);
}

template <int kBytes>
DEVICE_INLINE void store_bytes(void* to, const void* from) {
  struct alignas(kBytes) Bytes {
    char value[kBytes];
  };
  *static_cast<Bytes*>(to) = *static_cast<const Bytes*>(from);
}

template <class T>
void multiply_add_if(uint32_t bits, uint32_t mask, T a, T b, T& sum) {
  if (bits & mask) sum += a * b;
}

inline uint32_t merge_bits(uint32_t mask, uint32_t a, uint32_t b) { return (a & mask) | (b & ~mask); }

template <class T>
T kept(T value) {
  return value;
}

template <int kBytes>
void cp_async(void* to, const void* from, bool valid) {
  cuda_on_cpu::start_copy(to, from, kBytes, valid);
}
inline void cp_async_commit() { cuda_on_cpu::commit_copies(); }
template <int kGroupsLeft>
void cp_async_wait() {
  cuda_on_cpu::wait_for_copies(kGroupsLeft);
}

inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  // Rounds half away from zero; an infinity or NaN stays one.
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  cuda_on_cpu::multiply(cuda_on_cpu::Factor::kTf32, c, a, b, where);
}

template <class T>
void mma_16_bit(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  constexpr bool bfloat16 = std::is_same_v<T, __nv_bfloat16>;
  cuda_on_cpu::multiply(bfloat16 ? cuda_on_cpu::Factor::kBFloat16 : cuda_on_cpu::Factor::kFloat16, c, a, b, where);
}

}  // namespace metamask::cuda
