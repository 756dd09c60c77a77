// Compiled once for each instruction set (cpu/kernels/isa.h).
//
// With AVX-512, float32, the sums of all 16 subsets of four neighbouring products are one register, and the four bits of 16 tasks
// pick theirs by one permutation: an addition for 64 terms, where a masked one would take 16. Elsewhere each vector of products is
// added to the tasks whose bits are set.
#include "cpu/kernels/superposition.h"

#include "cpu/kernels/mask_vector.h"

namespace metamask::cpu {
namespace {

// R tasks by C samples; `products` holds the samples' products a w, padded with zeros.
template <class T, int R, int C>
METAMASK_INLINE void add_tile(const T* products, const uint8_t* const* bits, int64_t offset, T* sums, int64_t sums_row,
                              int64_t columns) {
  using V = typename Vector<T>::type;
  constexpr int64_t kLanes = Vector<T>::kLanes;
  V totals[R][C] = {};
  for (int64_t k = 0; k < columns; k += kLanes) {
    const int64_t n = columns - k;
    V terms[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) terms[c] = load(products + c * kSuperposedColumns + k);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const uint8_t* row = bits[r] + offset;
      const auto mask = n < kLanes ? mask_of(products, row, k, n) : mask_of(products, row, k);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) totals[r][c] += select(mask, terms[c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sums[c * sums_row + r] += sum<T>(totals[r][c]);
  }
}

// A row of products a w, padded with zeros to whole vectors.
template <class T>
METAMASK_INLINE void multiply(const T* a, const T* w, T* products, int64_t columns) {
  constexpr int64_t kLanes = Vector<T>::kLanes;
  int64_t k = 0;
  for (; k + kLanes <= columns; k += kLanes) store(products + k, load(a + k) * load(w + k));
  if (k < columns) store(products + k, load_some(a + k, columns - k) * load_some(w + k, columns - k));
}

template <class T>
void add(const T* a, int64_t a_row, const T* w, const uint8_t* const* bits, int64_t offset, T* sums, int64_t sums_row,
         int64_t samples, int64_t tasks, int64_t columns) {
  constexpr int kSamples = 4, kTasks = 2;
  alignas(64) T products[kSamples * kSuperposedColumns];
  for (int64_t b = 0; b < samples; b += kSamples) {
    with_count<kSamples>(samples - b, [&](auto c) {
      constexpr int kCount = decltype(c)::kValue;
      for (int i = 0; i < kCount; ++i) multiply(a + (b + i) * a_row, w, products + i * kSuperposedColumns, columns);
      for (int64_t t = 0; t < tasks; t += kTasks) {
        with_count<kTasks>(tasks - t, [&](auto r) {
          add_tile<T, decltype(r)::kValue, kCount>(products, bits + t, offset, sums + b * sums_row + t, sums_row, columns);
        });
      }
    });
  }
}

#if defined(__AVX512F__)

constexpr int kWord = 32, kNibbles = 8;  // bits of a task that are kept in a lane; fours in them
constexpr int kWords = kSuperposedColumns / kWord, kGroups = kSuperposedTasks / kTaskPad;

struct Tables {
  alignas(64) float of[kSuperposedColumns / 4][16];
};

// Entry i of a four's table is the sum of its products whose bits are set in i.
METAMASK_INLINE void build(const float* products, Tables& tables, int64_t columns) {
  // First the sums of two neighbours a and b: 0, a, b, a + b, for four such pairs in a register.
  const __m512i first = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(1)), eight = _mm512_set1_epi32(8);
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
  const __m512i high = _mm512_setr_epi32(4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7);
  for (int64_t k = 0; k < columns; k += 16) {
    const __m512 v = _mm512_load_ps(products + k);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i from = half == 0 ? _mm512_setzero_si512() : eight;
      const __m512 a = _mm512_maskz_permutexvar_ps(0xaaaa, _mm512_add_epi32(first, from), v);
      const __m512 b = _mm512_maskz_permutexvar_ps(0xcccc, _mm512_add_epi32(second, from), v);
      const __m512 pairs = _mm512_add_ps(a, b);
#pragma GCC unroll 2
      for (int four = 0; four < 2; ++four) {
        const __m512i at = four == 0 ? _mm512_setzero_si512() : eight;
        const __m512 table = _mm512_add_ps(_mm512_permutexvar_ps(_mm512_add_epi32(low, at), pairs),
                                           _mm512_permutexvar_ps(_mm512_add_epi32(high, at), pairs));
        _mm512_store_ps(tables.of[k / 4 + 2 * half + four], table);
      }
    }
  }
}

// Adds to sums[s] + g * kTaskPad, for the first `fours` fours of columns.
template <int S, int G>
METAMASK_INLINE void look_up(const Tables* tables, const uint32_t (*words)[kWords][kTaskPad], float* const* sums, int64_t fours) {
  __m512 totals[S][G];
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) totals[s][g] = _mm512_loadu_ps(sums[s] + g * kTaskPad);
  }
  for (int64_t first = 0; first < fours; first += kNibbles) {
    __m512i bits[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) bits[g] = _mm512_load_si512(words[g][first / kNibbles]);
    const int64_t end = first + kNibbles < fours ? first + kNibbles : fours;
    // Not unrolled, and each sum kept where it is: GCC would look up all fours before it adds, and keep them in memory.
#pragma GCC unroll 1
    for (int64_t four = first; four < end; ++four) {
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) {
        const __m512 table = _mm512_load_ps(tables[s].of[four]);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) totals[s][g] = kept(_mm512_add_ps(totals[s][g], _mm512_permutexvar_ps(bits[g], table)));
      }
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) bits[g] = _mm512_srli_epi32(bits[g], 4);
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) _mm512_storeu_ps(sums[s] + g * kTaskPad, totals[s][g]);
  }
}

// The `some` bytes after `offset` of kTaskPad tasks' bits, eight words each, as words[word][task]; of `tasks` if those are fewer.
METAMASK_INLINE void side_by_side(const uint8_t* const* bits, int64_t tasks, int64_t offset, __mmask32 some,
                                  uint32_t (*words)[kTaskPad]) {
  constexpr int kHalf = kTaskPad / 2;
  __m256i rows[kTaskPad];
  for (int64_t t = 0; t < kTaskPad; ++t) {
    rows[t] = t < tasks ? _mm256_maskz_loadu_epi8(some, bits[t] + offset) : _mm256_setzero_si256();
    // Each task's bits are elsewhere in memory.
    if (t + kTaskPad < tasks) __builtin_prefetch(bits[t + kTaskPad] + offset);
  }
  // Eight words of tasks t and t + kHalf in a register; its quarters are transposed, and then put in place.
  __m512i quarters[2][4];  // of tasks 0 to 3 and 4 to 7, by word % 4
  for (int half = 0; half < 2; ++half) {
    __m512i row[4];
    for (int t = 0; t < 4; ++t) {
      row[t] = _mm512_inserti64x4(_mm512_castsi256_si512(rows[4 * half + t]), rows[4 * half + t + kHalf], 1);
    }
    const __m512i low01 = _mm512_unpacklo_epi32(row[0], row[1]), high01 = _mm512_unpackhi_epi32(row[0], row[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(row[2], row[3]), high23 = _mm512_unpackhi_epi32(row[2], row[3]);
    quarters[half][0] = _mm512_unpacklo_epi64(low01, low23);
    quarters[half][1] = _mm512_unpackhi_epi64(low01, low23);
    quarters[half][2] = _mm512_unpacklo_epi64(high01, high23);
    quarters[half][3] = _mm512_unpackhi_epi64(high01, high23);
  }
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), second = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  for (int word = 0; word < 4; ++word) {
    _mm512_store_si512(words[word], _mm512_permutex2var_epi64(quarters[0][word], first, quarters[1][word]));
    _mm512_store_si512(words[word + 4], _mm512_permutex2var_epi64(quarters[0][word], second, quarters[1][word]));
  }
}

METAMASK_INLINE bool all_zero(const float* products, int64_t columns) {
  __mmask16 other = 0;
  for (int64_t k = 0; k < columns; k += 16) {
    other |= _mm512_cmp_ps_mask(_mm512_load_ps(products + k), _mm512_setzero_ps(), _CMP_NEQ_UQ);  // NaN is not zero
  }
  return other == 0;
}

void add_by_tables(const float* a, int64_t a_row, const float* w, const uint8_t* const* bits, int64_t offset, float* sums,
                   int64_t sums_row, int64_t samples, int64_t tasks, int64_t columns) {
  constexpr int kSamples = 4, kTogether = 4;
  alignas(64) uint32_t words[kGroups][kWords][kTaskPad];  // by word, the tasks of a group side by side
  const int64_t groups = (tasks + kTaskPad - 1) / kTaskPad, bytes = (columns + 7) / 8;
  const __mmask32 some = bytes < 32 ? (__mmask32(1) << bytes) - 1 : ~__mmask32(0);
  for (int64_t g = 0; g < groups; ++g) side_by_side(bits + g * kTaskPad, tasks - g * kTaskPad, offset, some, words[g]);
  alignas(64) float products[kSuperposedColumns];
  Tables tables[kSamples];
  float* to[kSamples];
  const int64_t padded = (columns + 15) / 16 * 16, fours = (columns + 3) / 4;
  for (int64_t b = 0, count = 0; b < samples; ++b) {
    multiply(a + b * a_row, w, products, columns);
    // Behind a ReLU half of the gradients are zero: a unit that is off has no products.
    if (!all_zero(products, padded)) {
      build(products, tables[count], padded);
      to[count++] = sums + b * sums_row;
    }
    if (count == 0 || (count < kSamples && b + 1 < samples)) continue;
    with_count<kSamples>(count, [&](auto s) {
      for (int64_t g = 0; g < groups; g += kTogether) {
        with_count<kTogether>(groups - g, [&](auto together) {
          look_up<decltype(s)::kValue, decltype(together)::kValue>(tables, words + g, to, fours);
        });
        for (int i = 0; i < decltype(s)::kValue; ++i) to[i] += kTogether * kTaskPad;
      }
    });
    count = 0;
  }
}

#else
constexpr auto add_by_tables = &add<float>;
#endif

}  // namespace

const Superposition METAMASK_TABLE(kSuperposition) = {{add_by_tables}, {&add<double>}};

}  // namespace metamask::cpu
