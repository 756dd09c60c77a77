// Compiled once for each instruction set (cpu/kernels/isa.h).
//
// A tile of kRows x kColumns results is kept in registers while the sum runs: kRows + kColumns loads for kRows * kColumns
// multiplications. BLAS libraries pack both operands first, which pays for large matrices only, and some choose a lesser
// instruction set on some processors (docs/internals/performance.md has the measurements).
#include "cpu/kernels/gemm.h"

#include "cpu/kernels/vector.h"

namespace metamask::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 4, kColumns = 4;
#elif defined(__AVX2__)
constexpr int kRows = 4, kColumns = 3;
#elif defined(__aarch64__)
constexpr int kRows = 4, kColumns = 4;
#else
constexpr int kRows = 3, kColumns = 3;
#endif

constexpr int64_t kBlockRows = 2 * kRows;   // rows of `a` that stay in the first-level cache while b streams by
constexpr int64_t kBlockBytes = 32 * 1024;  // the most that they and one tile's columns of b take there
constexpr int64_t kBlockTerms = 64;         // rows of `b` likewise

template <>
struct Vector<Pair> {
  using Sum = float;
  typedef uint32_t type __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(Pair)), may_alias));
  static constexpr int64_t kLanes = kVectorBytes / sizeof(Pair);
};

template <class T>
using SumVector = typename Vector<typename Vector<T>::Sum>::type;

template <class V>
METAMASK_INLINE void multiply_add(V& sum, V a, V b) {
  sum += a * b;
}

#if defined(__AVX512BF16__)
METAMASK_INLINE void multiply_add(Vector<float>::type& sum, Vector<Pair>::type a, Vector<Pair>::type b) {
  sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

METAMASK_INLINE Vector<Pair>::type everywhere(Pair value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits | Vector<Pair>::type{};
}
#endif

// The sum of a vector's lanes. The vector is stored first: taken apart in registers, GCC keeps it in memory through the loop
// before.
template <class T>
METAMASK_INLINE T sum(typename Vector<T>::type value) {
  typedef T Part __attribute__((vector_size(16), may_alias));
  alignas(kVectorBytes) T lanes[Vector<T>::kLanes];
  store(lanes, value);
  constexpr int kLanes = 16 / sizeof(T);
  Part total = *reinterpret_cast<const Part*>(lanes);
#pragma GCC unroll 4
  for (int i = kLanes; i < Vector<T>::kLanes; i += kLanes) total += *reinterpret_cast<const Part*>(lanes + i);
  if constexpr (kLanes == 4) return (total[0] + total[2]) + (total[1] + total[3]);
  else return total[0] + total[1];
}

// y[c] += the sum of vectors[c]'s lanes.
template <int C, class T, class V>
METAMASK_INLINE void add_sums(T* y, const V* vectors) {
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) y[c] += sum<T>(vectors[c]);
}

#if defined(__AVX512F__)
// Four at a time, transposed: a quarter of the instructions.
template <int C>
METAMASK_INLINE void add_sums(float* y, const Vector<float>::type* vectors) {
  const __m512 a = vectors[0], b = C > 1 ? vectors[1] : a, c = C > 2 ? vectors[2] : a, d = C > 3 ? vectors[3] : a;
  const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  const __m128 total = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  constexpr __mmask8 kSome = (1 << C) - 1;
  _mm_mask_storeu_ps(y, kSome, _mm_add_ps(_mm_maskz_loadu_ps(kSome, y), total));
}
#endif

template <class T, int R, int C>
METAMASK_INLINE void gemm_nt_tile(const T* a, int64_t a_row, const T* b, int64_t b_row, typename Vector<T>::Sum* y, int64_t y_row,
                                  int64_t length) {
  using V = typename Vector<T>::type;
  SumVector<T> sums[R][C] = {};
  for (int64_t k = 0; k < length; k += Vector<T>::kLanes) {
    V columns[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) columns[c] = load(b + c * b_row + k);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V row = load(a + r * a_row + k);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) multiply_add(sums[r][c], row, columns[c]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) add_sums<C>(y + r * y_row, sums[r]);
}

template <class T, int R, int C>
METAMASK_INLINE void gemm_nn_tile(const T* a, int64_t a_row, int64_t a_next, const T* b, int64_t b_row, typename Vector<T>::Sum* y,
                                  int64_t y_row, int64_t terms, bool add) {
  using V = typename Vector<T>::type;
  constexpr int64_t kLanes = Vector<T>::kLanes;
  SumVector<T> sums[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) sums[r][c] = add ? load(y + r * y_row + c * kLanes) : SumVector<T>{};
  }
  for (int64_t j = 0; j < terms; ++j) {
    V columns[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) columns[c] = load(b + j * b_row + c * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V factor = everywhere(a[r * a_row + j * a_next]);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) multiply_add(sums[r][c], factor, columns[c]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) store(y + r * y_row + c * kLanes, sums[r][c]);
  }
}

template <class T>
void gemm_nt(const T* a, int64_t a_row, const T* b, int64_t b_row, typename Vector<T>::Sum* y, int64_t y_row, int64_t rows,
             int64_t columns, int64_t length) {
  constexpr int64_t kLanes = Vector<T>::kLanes;
  for (int64_t block = 0; block < rows; block += kBlockRows) {
    const int64_t end = block + kBlockRows < rows ? block + kBlockRows : rows;
    // The longest piece for which the rows of `a` and kColumns of b stay, in whole vectors.
    const int64_t most = kBlockBytes / int64_t(sizeof(T)) / (end - block + kColumns) / kLanes * kLanes;
    const int64_t parts = (length + most - 1) / most, part = ((length + parts - 1) / parts + kLanes - 1) / kLanes * kLanes;
    for (int64_t k = 0; k < length; k += part) {
      const int64_t some = length - k < part ? length - k : part;
      for (int64_t j = 0; j < columns; j += kColumns) {
        for (int64_t i = block; i < end; i += kRows) {
          with_count<kRows>(end - i, [&](auto r) {
            with_count<kColumns>(columns - j, [&](auto c) {
              gemm_nt_tile<T, decltype(r)::kValue, decltype(c)::kValue>(a + i * a_row + k, a_row, b + j * b_row + k, b_row,
                                                                        y + i * y_row + j, y_row, some);
            });
          });
        }
      }
    }
  }
}

template <class T>
void gemm_nn(const T* a, int64_t a_row, int64_t a_next, const T* b, int64_t b_row, typename Vector<T>::Sum* y, int64_t y_row,
             int64_t rows, int64_t terms, int64_t length, bool add) {
  constexpr int64_t kLanes = Vector<T>::kLanes;
  for (int64_t j = 0; j == 0 || j < terms; j += kBlockTerms) {
    const int64_t some = terms - j < kBlockTerms ? terms - j : kBlockTerms;
    for (int64_t k = 0; k < length; k += kColumns * kLanes) {
      with_count<kColumns>((length - k) / kLanes, [&](auto c) {
        for (int64_t i = 0; i < rows; i += kRows) {
          with_count<kRows>(rows - i, [&](auto r) {
            gemm_nn_tile<T, decltype(r)::kValue, decltype(c)::kValue>(a + i * a_row + j * a_next, a_row, a_next, b + j * b_row + k,
                                                                      b_row, y + i * y_row + k, y_row, some, add || j > 0);
          });
        }
      });
    }
  }
}

}  // namespace

const Gemm METAMASK_TABLE(kGemm) = {
    {&gemm_nt<float>, &gemm_nn<float>},
    {&gemm_nt<double>, &gemm_nn<double>},
#if defined(__AVX512BF16__)
    {&gemm_nt<Pair>, &gemm_nn<Pair>},
#else
    {nullptr, nullptr},
#endif
};

}  // namespace metamask::cpu
