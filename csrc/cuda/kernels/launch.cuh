// Parts of the launchers: pointers and types known at run time, and the number of blocks that share a sum.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/kernels/device.cuh"

namespace metamask::cuda {

// Returns whether every array may be accessed by packs of kPackBytes. A null pointer stands for no array.
template <class... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % kPackBytes == 0) && ...);
}

template <class T>
const T* in(const void* pointer) {
  return static_cast<const T*>(pointer);
}

template <class T>
T* out(void* pointer) {
  return static_cast<T*>(pointer);
}

// Passes a type as an argument.
template <class T>
struct Tag {
  using type = T;
};

// Calls run(Tag<P>) for the type P.
template <class Run>
auto with_type(Type type, Run run) {
  switch (type) {
    case Type::kFloat64: return run(Tag<double>{});
    case Type::kFloat32: return run(Tag<float>{});
    case Type::kBFloat16: return run(Tag<__nv_bfloat16>{});
    default: return run(Tag<__half>{});
  }
}

// Calls run.operator()<packs>().
template <class Run>
void with_alignment(bool packs, Run run) {
  if (packs) run.template operator()<true>();
  else run.template operator()<false>();
}

// Returns the bytes of a number in the arithmetic of parameters of this type.
inline int64_t compute_bytes(Type param) { return param == Type::kFloat64 ? sizeof(double) : sizeof(float); }

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// The grid of a launch. A device takes this many blocks; a number beyond it would be cut off without a word.
inline dim3 grid_of(int64_t x, int64_t y = 1, int64_t z = 1) {
  if (x > 0x7fffffff || y > 0xffff || z > 0xffff) {
    throw std::length_error("the tensors are too large for one launch: it would take " + std::to_string(x) + " x " +
                            std::to_string(y) + " x " + std::to_string(z) +
                            " blocks, and a device takes 2147483647 x 65535 x 65535");
  }
  return dim3(unsigned(x), unsigned(y), unsigned(z));
}

// The shares of a sum over `length`: `count` blocks, `each` of it a block.
struct Share {
  int count;
  int64_t each;
};

// A block takes `step` of it at a time. Eight blocks for each multiprocessor keep all of them busy to the end, if there is that
// much to do. A narrow layer gets one for each multiprocessor: more only make the sums of the blocks cost more.
inline Share share(int64_t length, int64_t step, int64_t blocks_without) {
  const int64_t steps = length > 0 ? ceil_div(length, step) : 1, most = std::max(64, multiprocessors());
  const int64_t wanted = ceil_div(8 * int64_t(multiprocessors()), blocks_without);
  const int64_t count = wanted < steps ? wanted : steps, each = ceil_div(steps, count < most ? count : most) * step;
  return {length > 0 ? int(ceil_div(length, each)) : 1, each};
}

// Returns whether rows are whole packs of both types, and begin at the address of a pack.
template <class P, class X, class... Pointers>
bool rows_aligned(int64_t in, Pointers... pointers) {
  return in * int64_t(sizeof(P)) % kPackBytes == 0 && in * int64_t(sizeof(X)) % kPackBytes == 0 && aligned(pointers...);
}

}  // namespace metamask::cuda
