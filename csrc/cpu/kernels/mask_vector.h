// Bit masks of vectors of weights. Everything is local to the object that includes it.
//
// With AVX-512 the bits of 16 weights are a mask register as they lie in memory; elsewhere each lane tests its bit.
#pragma once

#include "cpu/kernels/vector.h"

namespace metamask::cpu {
namespace {

template <class T>
METAMASK_INLINE T sum(typename Vector<T>::type value) {
  typedef T Part __attribute__((vector_size(16), may_alias));
  alignas(kVectorBytes) T lanes[Vector<T>::kLanes];
  store(lanes, value);
  constexpr int kLanes = 16 / sizeof(T), kParts = kVectorBytes / 16, kHalf = kParts == 1 ? 1 : kParts / 2;
  Part parts[kHalf];
#pragma GCC unroll 2
  for (int i = 0; i < kHalf; ++i) {
    parts[i] = *reinterpret_cast<const Part*>(lanes + i * kLanes);
    if constexpr (kParts > 1) parts[i] += *reinterpret_cast<const Part*>(lanes + (i + kHalf) * kLanes);
  }
  const Part total = kHalf == 2 ? parts[0] + parts[kHalf - 1] : parts[0];
  if constexpr (kLanes == 4) return (total[0] + total[2]) + (total[1] + total[3]);
  else return total[0] + total[1];
}

// Keeps a loaded vector in its register: GCC would load it again for each product, and the loads are what limits the loop.
template <class V>
METAMASK_INLINE V kept(V vector) {
#if defined(__AVX512F__)
  asm("" : "+v"(vector));
#endif
  return vector;
}

// Loads the first n lanes; the others are zero.
template <class T>
METAMASK_INLINE typename Vector<T>::type load_some(const T* from, int64_t n) {
  alignas(kVectorBytes) T lanes[Vector<T>::kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = from[i];
  return load(lanes);
}

#if defined(__AVX512F__)

template <class T>
struct Mask {
  __mmask16 lanes;
};
template <>
struct Mask<double> {
  __mmask8 lanes;
};

METAMASK_INLINE Mask<float> mask_of(const float*, const uint8_t* bits, int64_t k) {
  struct __attribute__((packed, may_alias)) Lanes {
    uint16_t of;
  };
  // GCC would load some of them into a general register first, and move them.
  __mmask16 lanes;
  asm("kmovw %1, %0" : "=k"(lanes) : "m"(*reinterpret_cast<const Lanes*>(bits + k / 8)));
  return {lanes};
}

// The mask of the last n columns of a row: not a byte behind them is read.
METAMASK_INLINE Mask<float> mask_of(const float*, const uint8_t* bits, int64_t k, int64_t n) {
  return {__mmask16(bits[k / 8] | (n > 8 ? bits[k / 8 + 1] << 8 : 0))};
}

// The masks of two vectors of columns from one load, for the types where that pays.
template <class T>
constexpr bool kPairs = sizeof(T) == sizeof(float);

template <class T>
struct MaskPair {
  Mask<T> first, second;
};

METAMASK_INLINE MaskPair<float> mask_pair(const float*, const uint8_t* bits) {
  struct __attribute__((packed, may_alias)) Lanes {
    uint32_t of;
  };
  __mmask32 lanes;
  asm("kmovd %1, %0" : "=k"(lanes) : "m"(*reinterpret_cast<const Lanes*>(bits)));
  return {{__mmask16(lanes)}, {__mmask16(_kshiftri_mask32(lanes, 16))}};
}

METAMASK_INLINE Mask<double> mask_of(const double*, const uint8_t* bits, int64_t k) { return {bits[k / 8]}; }
METAMASK_INLINE Mask<double> mask_of(const double*, const uint8_t* bits, int64_t k, int64_t) { return {bits[k / 8]}; }

METAMASK_INLINE Vector<float>::type select(Mask<float> mask, Vector<float>::type v) { return _mm512_maskz_mov_ps(mask.lanes, v); }
METAMASK_INLINE Vector<double>::type select(Mask<double> mask, Vector<double>::type v) {
  return _mm512_maskz_mov_pd(mask.lanes, v);
}

// sum += a b where the mask is set.
METAMASK_INLINE void add_product(Vector<float>::type& sum, Mask<float> mask, Vector<float>::type a, Vector<float>::type b) {
  sum = _mm512_mask3_fmadd_ps(a, b, sum, mask.lanes);
}
METAMASK_INLINE void add_product(Vector<double>::type& sum, Mask<double> mask, Vector<double>::type a, Vector<double>::type b) {
  sum = _mm512_mask3_fmadd_pd(a, b, sum, mask.lanes);
}

#else

template <class T>
struct Lane;
template <>
struct Lane<float> {
  typedef int32_t Integer;
};
template <>
struct Lane<double> {
  typedef int64_t Integer;
};

template <class T>
struct Mask {
  typedef typename Lane<T>::Integer Integer;
  typedef Integer type __attribute__((vector_size(kVectorBytes)));
  type lanes;  // all bits of a lane set, or none
};

template <class T>
constexpr bool kPairs = false;
template <class T>
struct MaskPair;  // never made
template <class T>
MaskPair<T> mask_pair(const T*, const uint8_t* bits);

// At most 8 lanes, which never cross a byte.
template <class T>
METAMASK_INLINE Mask<T> mask_of(const T*, const uint8_t* bits, int64_t k) {
  using Integer = typename Mask<T>::Integer;
  typename Mask<T>::type own;
#pragma GCC unroll 8
  for (int i = 0; i < Vector<T>::kLanes; ++i) own[i] = Integer(1) << i;
  return {((Integer(bits[k / 8] >> (k % 8)) - typename Mask<T>::type{}) & own) == own};
}

template <class T>
METAMASK_INLINE Mask<T> mask_of(const T* kind, const uint8_t* bits, int64_t k, int64_t) {
  return mask_of(kind, bits, k);
}

template <class T, class V>
METAMASK_INLINE V select(Mask<T> mask, V v) {
  return (V)((typename Mask<T>::type)v & mask.lanes);
}

template <class T, class V>
METAMASK_INLINE void add_product(V& sum, Mask<T> mask, V a, V b) {
  sum += select(mask, a * b);
}

#endif

}  // namespace
}  // namespace metamask::cpu
