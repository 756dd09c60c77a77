// The gate g, g' and g'', one element at a time, for the host and the device: the one home of the mathematics
// (metamask_ext/reference.py states it in plain torch). No torch, no CUDA headers.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cmath>
#define METAMASK_INLINE __host__ __device__ __forceinline__
#else
// Forced, so that no out-of-line copy exists that the linker could merge between objects compiled for different instruction sets.
#define METAMASK_INLINE inline __attribute__((always_inline))
#endif

namespace metamask {

enum GateKind : int64_t { kSigmoid = 0, kHard = 1 };

// A gate's value and derivatives at one logit.
template <class T>
struct GateValues {
  T s, d, d2;
};

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  using Bits = int32_t;
  static constexpr int kMantissa = 23, kBias = 127, kTerms = 7;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kLowest = -87.0f;  // below it 2^n would be subnormal; exp is taken as 0, at most 2e-38 away
  static constexpr float kInverseFactorial[] = {1.0f, 1.0f, 1.0f / 2, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040};
};

template <>
struct ExpConstants<double> {
  using Bits = int64_t;
  static constexpr int kMantissa = 52, kBias = 1023, kTerms = 13;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLog2e = 1.4426950408889634074, kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kLowest = -708.0;
  static constexpr double kInverseFactorial[] = {
      1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};
};

// exp(x) for x <= 0 (NaN stays NaN), without a branch or a library call, so that a compiler can vectorise a loop over it.
// exp(x) = 2^n exp(r) with |r| <= ln(2)/2 and the Taylor polynomial of exp(r), whose remainder is below half a unit in the last
// place.
template <class T>
METAMASK_INLINE T exp_nonpositive(T x) {
#if defined(__CUDA_ARCH__)
  return exp(x);
#else
  using C = ExpConstants<T>;
  using Bits = typename C::Bits;
  const T shifted = x * C::kLog2e + C::kRound;
  const T n = shifted - C::kRound;
  const T r = (x - n * C::kLn2High) - n * C::kLn2Low;
  T p = C::kInverseFactorial[C::kTerms];
  for (int k = C::kTerms - 1; k >= 0; --k) p = p * r + C::kInverseFactorial[k];
  Bits integer, zero;
  const T round = C::kRound;
  std::memcpy(&integer, &shifted, sizeof(T));
  std::memcpy(&zero, &round, sizeof(T));
  const Bits exponent = (integer - zero + C::kBias) << C::kMantissa;
  T scale;
  std::memcpy(&scale, &exponent, sizeof(T));
  return x < C::kLowest ? T(0) : p * scale;
#endif
}

// s = sigmoid(m / t) from e = exp(-|m / t|): nothing overflows, s reaches exactly 0 and 1, and d = s (1 - s) / t keeps its relative
// accuracy where s rounds to 1.
template <class T>
METAMASK_INLINE GateValues<T> sigmoid_gate(T m, T inverse_temperature) {
  const T x = m * inverse_temperature;
  const T e = exp_nonpositive(x < T(0) ? x : -x);
  const T r = T(1) / (T(1) + e);
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
METAMASK_INLINE GateValues<T> gate_values(T m, T parameter) {
  // The sigmoid's parameter arrives as 1 / temperature.
  if constexpr (kind == kSigmoid) return sigmoid_gate(m, parameter);
  else return hard_gate(m, parameter);
}

// The three passes over theta = w g(m), for one element.
template <GateKind kind, class T>
METAMASK_INLINE T theta_of(T w, T m, T parameter) {
  return w * gate_values<kind>(m, parameter).s;
}

template <class T>
struct Gradients {
  T theta, w, m;
};

template <GateKind kind, class T>
METAMASK_INLINE Gradients<T> backward_of(T g, T w, T m, T parameter) {
  const auto v = gate_values<kind>(m, parameter);
  return {w * v.s, g * v.s, g * w * v.d};
}

template <class T>
struct SecondGradients {
  T g, w, m;
};

template <GateKind kind, class T>
METAMASK_INLINE SecondGradients<T> double_backward_of(T a, T b, T g, T w, T m, T parameter) {
  const auto v = gate_values<kind>(m, parameter);
  return {a * v.s + b * w * v.d, b * g * v.d, a * g * v.d + b * g * w * v.d2};
}

}  // namespace metamask
