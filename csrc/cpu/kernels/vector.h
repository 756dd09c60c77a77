// Vectors of the instruction set that the source is compiled for. Everything is local to the object that includes it.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "cpu/kernels/gemm.h"

namespace metamask::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// The compilers' own vector type: one source for every instruction set.
template <class T>
struct Vector {
  using Sum = T;
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  static constexpr int64_t kLanes = kVectorBytes / sizeof(T);
  static constexpr int64_t kPad = kRowBytes / sizeof(T);
};

template <class T>
METAMASK_INLINE typename Vector<T>::type load(const T* from) {
  return *reinterpret_cast<const typename Vector<T>::unaligned*>(from);
}

template <class T>
METAMASK_INLINE void store(T* to, typename Vector<T>::type value) {
  *reinterpret_cast<typename Vector<T>::unaligned*>(to) = value;
}

template <class T>
METAMASK_INLINE typename Vector<T>::type everywhere(T value) {
  return value - typename Vector<T>::type{};
}

template <int value>
struct Constant {
  static constexpr int kValue = value;
};

// Calls work with the constant min(count, Most): the rows, or columns, of the next tile.
template <int Most, class Work>
METAMASK_INLINE void with_count(int64_t count, Work work) {
  if constexpr (Most > 1) {
    if (count < Most) return with_count<Most - 1>(count, work);
  }
  work(Constant<Most>());
}

}  // namespace
}  // namespace metamask::cpu
