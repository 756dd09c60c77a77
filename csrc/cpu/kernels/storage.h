// 16-bit floating point without torch: the objects compiled per instruction set must share no inline code with it.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/types.h"

namespace metamask::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

METAMASK_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

METAMASK_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

METAMASK_INLINE float widen(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }

// The magnitude's bits, moved to float's places, are the value times 2^-112 (subnormals included).
METAMASK_INLINE float widen(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
  return float_of(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}

METAMASK_INLINE void narrow(float x, BFloat16& out) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  out.bits = uint16_t(x != x ? 0x7fc0u : rounded);
}

// Adding 0.5 to a magnitude below 2^-14 rounds it to multiples of 2^-24, the spacing of float16's subnormals.
METAMASK_INLINE void narrow(float x, Float16& out) {
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out.bits = uint16_t(sign | half);
}

}  // namespace metamask::cpu
