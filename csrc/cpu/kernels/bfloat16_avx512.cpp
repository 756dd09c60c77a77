// The kernels of cpu/kernels/bfloat16.h: 32 elements are widened, worked on and rounded in registers. The loops of
// cpu/kernels/masked_weight.cpp convert a 16-bit array by blocks, through copies in the first-level cache; beside products as fast
// as these, the copies and float32's exact sigmoid would take most of the time.
#include "cpu/kernels/bfloat16.h"

#include <immintrin.h>

namespace metamask::cpu {
namespace {

constexpr int64_t kLanes = 32;
// Processors stop prefetching at the end of a page of 4 KiB: the next rows of W and M are prefetched two pages ahead.
constexpr int64_t kAhead = 8192;

// 32 elements: the first 16 and the other 16; or, in the functions by_pairs, those of even index and those of odd index.
struct Lanes {
  __m512 one, other;
};

METAMASK_INLINE __mmask32 first(int64_t n) { return n < kLanes ? (__mmask32(1) << n) - 1 : ~__mmask32(0); }

alignas(64) constexpr int16_t kLowWords[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                               8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
alignas(64) constexpr int16_t kHighWords[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};

alignas(64) constexpr int16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

template <bool whole>
METAMASK_INLINE Lanes load(const float* from, __mmask32 some) {
  if constexpr (whole) return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)};
  return {_mm512_maskz_loadu_ps(__mmask16(some), from), _mm512_maskz_loadu_ps(__mmask16(some >> 16), from + 16)};
}

template <bool whole>
METAMASK_INLINE __m512i load_words(const void* from, __mmask32 some) {
  return whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(some, from);
}

METAMASK_INLINE __m512 widened(BFloat16, __m256i words) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
METAMASK_INLINE __m512 widened(Float16, __m256i words) { return _mm512_cvtph_ps(words); }

template <bool whole, class S>
METAMASK_INLINE Lanes load(const S* from, __mmask32 some) {
  if constexpr (whole) {
    const __m256i* const halves = reinterpret_cast<const __m256i*>(from);
    return {widened(S{}, _mm256_loadu_si256(halves)), widened(S{}, _mm256_loadu_si256(halves + 1))};
  }
  const __m512i words = load_words<whole>(from, some);
  return {widened(S{}, _mm512_castsi512_si256(words)), widened(S{}, _mm512_extracti64x4_epi64(words, 1))};
}

// A vector of bfloat16 is widened by a shift and a mask.
template <bool whole>
METAMASK_INLINE Lanes load_by_pairs(const BFloat16* from, __mmask32 some) {
  const __m512i words = load_words<whole>(from, some);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000u))))};
}

template <bool whole>
METAMASK_INLINE void store(float* to, Lanes x, __mmask32 some) {
  if constexpr (whole) {
    _mm512_storeu_ps(to, x.one);
    _mm512_storeu_ps(to + 16, x.other);
  } else {
    _mm512_mask_storeu_ps(to, __mmask16(some), x.one);
    _mm512_mask_storeu_ps(to + 16, __mmask16(some >> 16), x.other);
  }
}

template <bool whole>
METAMASK_INLINE void store_words(void* to, __m512i words, __mmask32 some) {
  if constexpr (whole) _mm512_storeu_si512(to, words);
  else _mm512_mask_storeu_epi16(to, some, words);
}

template <bool whole>
METAMASK_INLINE void store(BFloat16* to, Lanes x, __mmask32 some) {
  store_words<whole>(to, __m512i(_mm512_cvtne2ps_pbh(x.other, x.one)), some);
}

template <bool whole>
METAMASK_INLINE void store_by_pairs(BFloat16* to, Lanes x, __mmask32 some) {
  const __m512i halves = __m512i(_mm512_cvtne2ps_pbh(x.other, x.one));
  store_words<whole>(to, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), halves), some);
}

template <bool whole>
METAMASK_INLINE void store(Float16* to, Lanes x, __mmask32 some) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m256i one = _mm512_cvtps_ph(x.one, kNearest), other = _mm512_cvtps_ph(x.other, kNearest);
  store_words<whole>(to, _mm512_inserti64x4(_mm512_castsi256_si512(one), other, 1), some);
}

// exp(x / log2(e)): the polynomial, of the least relative error, is 2^f for 0 <= f < 1; scalef multiplies it by 2^floor(x), and
// makes 2^-infinity exactly 0, 2^infinity infinite.
METAMASK_INLINE __m512 exp2(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0.01353417f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.05201146f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24144276f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69300383f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.00000259f));
  return _mm512_scalef_ps(p, x);
}

// s alone is 1 / (1 + exp(-m / t)): no branch by the sign, since infinity gives exactly 0. `scale` is -log2(e) / t, or the
// threshold. The reciprocal's relative error of 2^-14 is a thirty-second of that of rounding theta to bfloat16, 2^-9.
template <GateKind kind>
METAMASK_INLINE __m512 gate_at(__m512 m, __m512 scale) {
  const __m512 one = _mm512_set1_ps(1.0f);
  if constexpr (kind == kHard) return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(m, scale, _CMP_GT_OQ), one);
  return _mm512_rcp14_ps(_mm512_add_ps(exp2(_mm512_mul_ps(m, scale)), one));
}

METAMASK_INLINE __m512 scale_of(Gate gate) {
  return _mm512_set1_ps(gate.kind == kSigmoid ? float(-1.4426950408889634 / gate.param) : float(gate.param));
}

// Prefetches the lines of 32 elements, kAhead behind these: one of 16-bit elements, two of float32's. Into the second-level cache,
// which waits for more lines at a time than the first.
template <class S>
METAMASK_INLINE void prefetch(const S* from) {
  constexpr int kLine = 64;
  for (int at = 0; at < kLanes * int(sizeof(S)); at += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead + at, 0, 2);
  }
}

template <bool value>
struct Whole {
  static constexpr bool kValue = value;
};

// Calls work(whole, first element, its lanes) for every 32 elements; `whole` says at compile time that none is masked.
template <class Work>
METAMASK_INLINE void each_lanes(int64_t n, Work work) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) work(Whole<true>(), i, ~__mmask32(0));
  if (i < n) work(Whole<false>(), i, first(n - i));
}

// Where all arrays are bfloat16, pairs take one shuffle in all, halves two for each array that is read.
template <class P, class M>
constexpr bool kByPairs = false;
template <>
constexpr bool kByPairs<BFloat16, BFloat16> = true;

template <class P, class M, GateKind kind>
void theta_range(Gate gate, const void* weights, const void* logits, BFloat16* theta, int64_t n) {
  const P* w = static_cast<const P*>(weights);
  const M* m = static_cast<const M*>(logits);
  const __m512 scale = scale_of(gate);
  each_lanes(n, [&](auto whole, int64_t i, __mmask32 some) {
    constexpr bool kWhole = decltype(whole)::kValue;
    prefetch(w + i);
    prefetch(m + i);
    const auto theta_at = [&](Lanes weight, Lanes logit) -> Lanes {
      return {_mm512_mul_ps(weight.one, gate_at<kind>(logit.one, scale)),
              _mm512_mul_ps(weight.other, gate_at<kind>(logit.other, scale))};
    };
    if constexpr (kByPairs<P, M>) {
      store_by_pairs<kWhole>(theta + i, theta_at(load_by_pairs<kWhole>(w + i, some), load_by_pairs<kWhole>(m + i, some)), some);
    } else {
      store<kWhole>(theta + i, theta_at(load<kWhole>(w + i, some), load<kWhole>(m + i, some)), some);
    }
  });
}

// One element's gradients in each lane, as backward_of in core/gate.h.
struct LaneGradients {
  __m512 theta, w, m;
};

// Uses the formulas of core/gate.h: 1 - s is e / (1 + e), or 1 / (1 + e), with e = exp(-|m / t|), accurate where s rounds to 1.
template <GateKind kind>
METAMASK_INLINE LaneGradients backward_at(__m512 g, __m512 w, __m512 m, __m512 scale, __m512 inverse_temperature) {
  const __m512 gw = _mm512_mul_ps(g, w);
  if constexpr (kind == kHard) {
    const __m512 s = gate_at<kind>(m, scale);
    return {_mm512_mul_ps(w, s), _mm512_mul_ps(g, s), gw};
  }
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 e = exp2(_mm512_or_ps(_mm512_mul_ps(m, scale), _mm512_set1_ps(-0.0f)));
  const __m512 sum = _mm512_add_ps(one, e), guess = _mm512_rcp14_ps(sum);
  const __m512 r = _mm512_fmadd_ps(guess, _mm512_fnmadd_ps(sum, guess, one), guess), small = _mm512_mul_ps(e, r);
  const __m512 s = _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(m)), r, small);
  const __m512 d = _mm512_mul_ps(_mm512_mul_ps(small, r), inverse_temperature);
  return {_mm512_mul_ps(w, s), _mm512_mul_ps(g, s), _mm512_mul_ps(gw, d)};
}

METAMASK_INLINE void spread(float* to, Lanes x) {
  _mm512_store_ps(to, x.one);
  _mm512_store_ps(to + 16, x.other);
}

METAMASK_INLINE Lanes gathered(const float* from) { return {_mm512_load_ps(from), _mm512_load_ps(from + 16)}; }

// Gives one parameter's gradients g, at elements from i on, to their sink; p is the parameter there.
template <class P, bool whole>
METAMASK_INLINE void give(const Sink& sink, int64_t i, Lanes p, Lanes g, __mmask32 some) {
  if (sink.gradient != nullptr) {
    P* const to = static_cast<P*>(sink.gradient) + i;
    prefetch(to);  // a store waits for its line, too
    store<whole>(to, g, some);
  }
  if (sink.parameter == nullptr) return;
  alignas(64) float parameter[kLanes], gradient[kLanes], momentum_buffer[kLanes] = {};
  spread(parameter, p);
  spread(gradient, g);
  if (sink.exp_avg != nullptr) {
    alignas(64) float mean[kLanes], square[kLanes];
    P *const means = static_cast<P*>(sink.exp_avg) + i, *const squares = static_cast<P*>(sink.exp_avg_sq) + i;
    prefetch(means);
    prefetch(squares);
    spread(mean, load<whole>(means, some));
    spread(square, load<whole>(squares, some));
    const AdamW adamw = sink.adamw;
    for (int64_t j = 0; j < kLanes; ++j) parameter[j] = descend(parameter[j], gradient[j], adamw, mean[j], square[j]);
    store<whole>(static_cast<P*>(sink.parameter) + i, gathered(parameter), some);
    store<whole>(means, gathered(mean), some);
    store<whole>(squares, gathered(square), some);
    return;
  }
  P* const buffer = static_cast<P*>(sink.momentum_buffer) + (sink.momentum_buffer == nullptr ? 0 : i);
  if (sink.momentum_buffer != nullptr) spread(momentum_buffer, load<whole>(buffer, some));
  const Sgd sgd = sink.sgd;
  for (int64_t j = 0; j < kLanes; ++j) parameter[j] = descend(parameter[j], gradient[j], sgd, momentum_buffer[j]);
  store<whole>(static_cast<P*>(sink.parameter) + i, gathered(parameter), some);
  if (sink.momentum_buffer != nullptr) store<whole>(buffer, gathered(momentum_buffer), some);
}

template <class P, class M, GateKind kind>
void backward_range(Gate gate, const float* g, const void* weights, const void* logits, BFloat16* theta, const Sink& dw,
                    const Sink& dm, int64_t n) {
  const P* w = static_cast<const P*>(weights);
  const M* m = static_cast<const M*>(logits);
  const __m512 scale = scale_of(gate), inverse_temperature = _mm512_set1_ps(float(1.0 / gate.param));
  each_lanes(n, [&](auto whole, int64_t i, __mmask32 some) {
    constexpr bool kWhole = decltype(whole)::kValue;
    prefetch(w + i);
    prefetch(m + i);
    const Lanes weight = load<kWhole>(w + i, some), logit = load<kWhole>(m + i, some), grad = load<kWhole>(g + i, some);
    const LaneGradients one = backward_at<kind>(grad.one, weight.one, logit.one, scale, inverse_temperature);
    const LaneGradients other = backward_at<kind>(grad.other, weight.other, logit.other, scale, inverse_temperature);
    if (theta != nullptr) store<kWhole>(theta + i, Lanes{one.theta, other.theta}, some);
    give<P, kWhole>(dw, i, weight, {one.w, other.w}, some);
    give<M, kWhole>(dm, i, logit, {one.m, other.m}, some);
  });
}

// Calls RANGE<storage of W, storage of M, gate>.
#define DISPATCH_KIND(RANGE, P, M, ...) gate.kind == kSigmoid ? RANGE<P, M, kSigmoid>(__VA_ARGS__) : RANGE<P, M, kHard>(__VA_ARGS__)
#define DISPATCH_16(RANGE, P, ...) \
  types.mask == Type::kFloat32 ? DISPATCH_KIND(RANGE, P, float, __VA_ARGS__) : DISPATCH_KIND(RANGE, P, P, __VA_ARGS__)
#define DISPATCH(RANGE, ...)                                                \
  switch (types.weight) {                                                   \
    case Type::kBFloat16: DISPATCH_16(RANGE, BFloat16, __VA_ARGS__); break; \
    case Type::kFloat16: DISPATCH_16(RANGE, Float16, __VA_ARGS__); break;   \
    default: DISPATCH_KIND(RANGE, float, float, __VA_ARGS__); break;        \
  }

void theta(Gate gate, ParamTypes types, const void* w, const void* m, BFloat16* theta, int64_t n) {
  DISPATCH(theta_range, gate, w, m, theta, n)
}

void backward(Gate gate, ParamTypes types, const float* g, const void* w, const void* m, BFloat16* theta, const Sink& dw,
              const Sink& dm, int64_t n) {
  DISPATCH(backward_range, gate, g, w, m, theta, dw, dm, n)
}

void pair_rows(const BFloat16* from, int64_t row, int64_t rows, int64_t columns, Pair* to, int64_t to_row) {
  const __m512i low = _mm512_load_si512(kLowWords), high = _mm512_load_si512(kHighWords);
  for (int64_t i = 0; i < rows; i += 2, to += to_row) {
    const BFloat16 *one = from + i * row, *other = one + row;
    for (int64_t k = 0; k < columns; k += kLanes) {
      const __mmask32 some = first(columns - k);
      const __m512i a = _mm512_maskz_loadu_epi16(some, one + k);
      const __m512i b = _mm512_maskz_loadu_epi16(i + 1 < rows ? some : 0, other + k);
      _mm512_storeu_si512(to + k, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(to + k + 16, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

void round(const float* from, BFloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 some = __mmask16(first(n - i));
    _mm256_mask_storeu_epi16(to + i, some, __m256i(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, from + i))));
  }
}

}  // namespace

const BFloat16Kernels kBFloat16_avx512_bf16 = {&theta, &backward, &pair_rows, &round};

}  // namespace metamask::cpu
