// Loads and stores of packs of N neighbouring elements, at most kPackBytes at a time, below a bound n. kWhole: no pack lies across
// the bound, because a row is a whole number of packs; then a pack is one access or none.
//
// No pointer is __restrict__: a kernel that updates a parameter in place must not read it through the cache for constants.
#pragma once

#include "cuda/kernels/device.cuh"

namespace metamask::cuda {

// Loads a pack, with zeros beyond the bound. kInside: all of it is below the bound.
template <int N, bool kWhole = false, bool kInside = false, class T>
DEVICE_INLINE Pack<T, N> load_pack(const T* from, int64_t i, int64_t n) {
  if constexpr (kInside) return *reinterpret_cast<const Pack<T, N>*>(from + i);
  Pack<T, N> pack;
  if IN_BOUNDS (i + N <= n) {
    pack = *reinterpret_cast<const Pack<T, N>*>(from + i);
  } else {
    for (int k = 0; k < N; ++k) {
      pack.value[k] = T(0.0f);
      if constexpr (!kWhole) {
        if IN_BOUNDS (i + k < n) pack.value[k] = from[i + k];
      }
    }
  }
  return pack;
}

template <int N, bool kWhole = false, bool kInside = false, class T>
DEVICE_INLINE void load(const T* from, int64_t i, int64_t n, Compute<T> (&to)[N]) {
  const Pack<T, N> pack = load_pack<N, kWhole, kInside>(from, i, n);
  for (int k = 0; k < N; ++k) to[k] = to_compute(pack.value[k]);
}

// Loads a pack; zeros if there is no array.
template <int N, bool kWhole = false, bool kInside = false, class T>
DEVICE_INLINE void load_or_zero(const T* from, int64_t i, int64_t n, Compute<T> (&to)[N]) {
  if (from != nullptr) {
    load<N, kWhole, kInside>(from, i, n, to);
  } else {
    for (int k = 0; k < N; ++k) to[k] = 0;
  }
}

// Stores a pack; does nothing if there is no array.
template <int N, bool kWhole = false, bool kInside = false, class T>
DEVICE_INLINE void store(T* to, int64_t i, int64_t n, const Compute<T> (&from)[N]) {
  if (to == nullptr) return;
  Pack<T, N> pack;
  for (int k = 0; k < N; ++k) from_compute(from[k], pack.value[k]);
  if (kInside || IN_BOUNDS(i + N <= n)) {
    store_bytes<int(sizeof pack)>(to + i, &pack);
  } else if constexpr (!kWhole) {
    for (int k = 0; k < N; ++k) {
      if IN_BOUNDS (i + k < n) to[i + k] = pack.value[k];
    }
  }
}

// Stores the gradient g, or takes one step of the parameter, whose elements are p, along it.
template <int N, class P, bool kWhole = false, bool kInside = false>
DEVICE_INLINE void store_or_descend(const Sink& sink, int64_t i, int64_t n, const Compute<P> (&p)[N], const Compute<P> (&g)[N]) {
  store<N, kWhole, kInside>(static_cast<P*>(sink.gradient), i, n, g);
  if (sink.parameter == nullptr) return;
  P* momentum_buffer = static_cast<P*>(sink.momentum_buffer);
  Compute<P> v[N], to[N];
  load_or_zero<N, kWhole, kInside>(momentum_buffer, i, n, v);
  for (int k = 0; k < N; ++k) to[k] = descend(p[k], g[k], sink.sgd, v[k]);
  store<N, kWhole, kInside>(momentum_buffer, i, n, v);
  store<N, kWhole, kInside>(static_cast<P*>(sink.parameter), i, n, to);
}

}  // namespace metamask::cuda
