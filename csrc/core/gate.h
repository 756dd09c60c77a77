// The gate g, g' and g'', one element at a time, for the host and the device: the one home of the mathematics. Each reference.py of
// metamask_ext states it in plain torch. No torch, no CUDA headers.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cmath>
#define METAMASK_INLINE __host__ __device__ __forceinline__
#else
// Inlining is forced: an out-of-line copy could be merged by the linker between objects compiled for different instruction sets.
#define METAMASK_INLINE inline __attribute__((always_inline))
#endif

namespace metamask {

// kIdentity is no mask's gate: with it "logits" are weights that differ by task, and the shared weight a factor of theirs. Only
// task_masked_linear on the CPU has it.
enum GateKind : int64_t { kSigmoid = 0, kHard = 1, kIdentity = 3 };

// A gate's value and derivatives at one logit.
template <class T>
struct GateValues {
  T s, d, d2;
};

template <class T>
struct ExpConstants;

// kRound = 1.5 * 2^mantissa + bias: added to a number, it leaves the nearest integer, with an exponent's bias, in the low bits.
// kPolynomial: q in exp(r) = 1 + r + r^2 q(r) for |r| <= ln(2) / 2.
template <>
struct ExpConstants<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23, kTerms = 4;
  static constexpr float kRound = 12582912.0f + 127.0f;
  static constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kLowest = -87.0f;  // below it 2^n would be subnormal; exp is taken as 0, at most 2e-38 away
  // The least relative error for this many terms, 1.1e-7: with the roundings, three units in the last place.
  static constexpr float kPolynomial[] = {0.49999225850266316f, 0.16667118169389702f, 0.041890987379013436f, 0.008312430338511796f};
};

template <>
struct ExpConstants<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52, kTerms = 12;
  static constexpr double kRound = 6755399441055744.0 + 1023.0;
  static constexpr double kLog2e = 1.4426950408889634074, kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kLowest = -708.0;
  // Taylor's, whose remainder is below half a unit in the last place.
  static constexpr double kPolynomial[] = {1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,
                                           1.0 / 720,     1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
                                           1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};
};

// exp(x) for x <= 0 (NaN stays NaN), without a branch or a library call, so that a compiler can vectorise a loop over it.
// exp(x) = 2^n exp(r) with |r| <= ln(2) / 2.
template <class T>
METAMASK_INLINE T exp_nonpositive(T x) {
#if defined(__CUDA_ARCH__)
  return exp(x);
#else
  using C = ExpConstants<T>;
  const T shifted = x * C::kLog2e + C::kRound;
  const T n = shifted - C::kRound;
  const T r = (x - n * C::kLn2High) - n * C::kLn2Low;
  T p = C::kPolynomial[C::kTerms - 1];
  for (int k = C::kTerms - 2; k >= 0; --k) p = p * r + C::kPolynomial[k];
  p = (p * r + T(1)) * r + T(1);
  typename C::Bits exponent;
  std::memcpy(&exponent, &shifted, sizeof(T));
  exponent <<= C::kMantissa;
  T scale;
  std::memcpy(&scale, &exponent, sizeof(T));
  return x < C::kLowest ? T(0) : p * scale;
#endif
}

// -|x|: one operation on the sign bit, where a comparison is two.
template <class T>
METAMASK_INLINE T minus_magnitude(T x) {
#if defined(__CUDA_ARCH__)
  return -fabs(x);  // part of the operation that takes it
#else
  using Bits = typename ExpConstants<T>::Bits;
  Bits bits;
  std::memcpy(&bits, &x, sizeof(T));
  bits |= Bits(1) << (8 * sizeof(T) - 1);
  std::memcpy(&x, &bits, sizeof(T));
  return x;
#endif
}

// 1 / x for 1 <= x <= 2; NaN stays NaN. The device has a shorter way for float than a division (cuda/kernels/device.cuh).
template <class T>
struct Reciprocal {
  METAMASK_INLINE static T of(T x) { return T(1) / x; }
};

// s = sigmoid(m / t) from e = exp(-|m / t|): nothing overflows, s reaches exactly 0 and 1, and d = s (1 - s) / t keeps its relative
// accuracy where s rounds to 1.
template <class T>
METAMASK_INLINE GateValues<T> sigmoid_gate(T m, T inverse_temperature) {
  const T x = m * inverse_temperature;
  const T e = exp_nonpositive(minus_magnitude(x));
  const T r = Reciprocal<T>::of(T(1) + e);
  const T small = e * r;
  const T s = x < T(0) ? small : r;
  const T d = small * r * inverse_temperature;
  const T slope = (T(1) - e) * r;  // |1 - 2s|
  return {s, d, d * (x < T(0) ? slope : -slope) * inverse_temperature};
}

// s = 1[m > c], differentiated as if it were m.
template <class T>
METAMASK_INLINE GateValues<T> hard_gate(T m, T threshold) {
  return {m > threshold ? T(1) : T(0), T(1), T(0)};
}

template <GateKind kind, class T>
METAMASK_INLINE GateValues<T> gate_values(T m, T gate_param) {
  // gate_param_of (core/types.h) has turned the sigmoid's temperature into its inverse.
  if constexpr (kind == kSigmoid) return sigmoid_gate(m, gate_param);
  else if constexpr (kind == kIdentity) return {m, T(1), T(0)};
  else return hard_gate(m, gate_param);
}

// Forward, backward and double backward of theta = w g(m), for one element.
template <GateKind kind, class T>
METAMASK_INLINE T theta_of(T w, T m, T gate_param) {
  return w * gate_values<kind>(m, gate_param).s;
}

template <class T>
struct Gradients {
  T theta, w, m;
};

template <GateKind kind, class T>
METAMASK_INLINE Gradients<T> backward_of(T g, T w, T m, T gate_param) {
  const auto v = gate_values<kind>(m, gate_param);
  return {w * v.s, g * v.s, g * w * v.d};
}

template <class T>
struct SecondGradients {
  T g, w, m;
};

template <GateKind kind, class T>
METAMASK_INLINE SecondGradients<T> double_backward_of(T a, T b, T g, T w, T m, T gate_param) {
  const auto v = gate_values<kind>(m, gate_param);
  return {a * v.s + b * w * v.d, b * g * v.d, a * g * v.d + b * g * w * v.d2};
}

}  // namespace metamask
