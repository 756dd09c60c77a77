// Compiled once for each instruction set (cpu/kernels/isa.h).
#include "cpu/kernels/packed.h"

#include "cpu/kernels/mask_vector.h"

namespace metamask::cpu {
namespace {

// Tiles of results in registers: forward, sample rows by rows of W; the gradients, rows by vectors of columns.
#if defined(__AVX512F__)
constexpr int kRows = 4, kOutputs = 4, kColumns = 4;
#else
constexpr int kRows = 2, kOutputs = 2, kColumns = 2;
#endif

// Returns where row i, at most 3, begins: base, base + row, base + 2 row and base + three are addresses that the processor adds up
// itself. GCC would keep a pointer for each row instead, 16 of them for the bits alone, most of them in memory.
METAMASK_INLINE int64_t row_at(int i, int64_t row, int64_t three) { return i == 3 ? three : i * row; }

METAMASK_INLINE int64_t three_of(int64_t row) {
  int64_t three = 3 * row;
#if defined(__x86_64__)
  asm("" : "+r"(three));
#endif
  return three;
}

template <class T>
METAMASK_INLINE const T* advance(const T* pointer, int64_t elements) {
  pointer += elements;
#if defined(__x86_64__)
  asm("" : "+r"(pointer));
#endif
  return pointer;
}

// y[r, c] += sum of sums[r][c], with the additions of `sum`, so that a row's result does not depend on its neighbours.
template <class T, int R, int C>
METAMASK_INLINE void add_sums(const typename Vector<T>::type (&sums)[R][C], T* y, int64_t y_row) {
#if defined(__AVX512F__)
  if constexpr (R == 4 && C == 4 && sizeof(T) == sizeof(float)) {
    // All 16 at once: a quarter of columns[c] is a row's sum for y's column c, still to be added up in itself.
    __m512 columns[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const auto halved = [](__m512 a, __m512 b) { return _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xEE); };
      const __m512 upper = halved(sums[0][c], sums[1][c]), lower = halved(sums[2][c], sums[3][c]);
      columns[c] = _mm512_shuffle_f32x4(upper, lower, 0x88) + _mm512_shuffle_f32x4(upper, lower, 0xDD);
    }
    const auto halved = [](__m512 a, __m512 b) { return _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b); };
    const __m512 left = halved(columns[0], columns[1]), right = halved(columns[2], columns[3]);
    alignas(kVectorBytes) float all[R * C];
    store(all, _mm512_shuffle_ps(left, right, 0x44) + _mm512_shuffle_ps(left, right, 0xEE));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      float* const row = y + r * y_row;
      _mm_storeu_ps(row, _mm_loadu_ps(row) + _mm_load_ps(all + r * C));
    }
    return;
  }
#endif
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) y[r * y_row + c] += sum<T>(sums[r][c]);
  }
}

// The prefetches of a tile: `lines` of kRowBytes in each step of its loop. Issued all at once, they would keep its own loads
// waiting.
struct Ahead {
  const char* from;
  int64_t lines;
};

// kFinite: all of x is finite, so that a product that is off may be left out instead of added as 0 times x, an operation less; and
// one load has the bits of two vectors. Only for kPairs. kStep: the columns of a step.
template <class T, bool kFinite>
constexpr int64_t kStep = (kFinite ? 2 : 1) * Vector<T>::kLanes;

template <class T, bool kFinite, int R, int C>
METAMASK_INLINE void forward_tile(const T* x, int64_t x_row, const uint8_t* const* bits, int64_t offset, int64_t bits_row,
                                  const T* w, int64_t w_row, T* y, int64_t y_row, int64_t columns, Ahead ahead) {
  using V = typename Vector<T>::type;
  constexpr int64_t kLanes = Vector<T>::kLanes;
  constexpr int kAtOnce = kFinite ? 2 : 1;
  static_assert(R <= 4 && C <= 4);
  V sums[R][C] = {};
  const uint8_t* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = bits[r] + offset;
  const int64_t x_three = three_of(x_row), w_three = three_of(w_row), bits_three = three_of(bits_row);
  int64_t k = 0;
  for (; k + kStep<T, kFinite> <= columns; k += kStep<T, kFinite>) {
    for (int64_t line = 0; line < ahead.lines; ++line, ahead.from += kRowBytes) __builtin_prefetch(ahead.from, 0, 2);
    V weights[C][kAtOnce];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 2
      for (int h = 0; h < kAtOnce; ++h) weights[c][h] = load(w + row_at(c, w_row, w_three) + h * kLanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      V inputs[kAtOnce];
#pragma GCC unroll 2
      for (int h = 0; h < kAtOnce; ++h) inputs[h] = kept(load(x + row_at(r, x_row, x_three) + h * kLanes));
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) {
        const uint8_t* const from = rows[r] + row_at(c, bits_row, bits_three);
        if constexpr (kFinite) {
          const MaskPair<T> masks = mask_pair(x, from);
          add_product(sums[r][c], masks.first, weights[c][0], inputs[0]);
          add_product(sums[r][c], masks.second, weights[c][1], inputs[1]);
        } else {
          sums[r][c] += select(mask_of(x, from, kLanes % 8 == 0 ? 0 : k % 8), weights[c][0]) * inputs[0];
        }
      }
      rows[r] = advance(rows[r], kLanes % 8 == 0 ? kAtOnce * kLanes / 8 : uint64_t(k % 8 + kLanes) / 8);
    }
    x = advance(x, kStep<T, kFinite>);
    w = advance(w, kStep<T, kFinite>);
  }
  // Unrolled to the end: sums that are once indexed by a variable are written to memory in each round above.
  while (k < columns) {
    const int64_t n = columns - k < kLanes ? columns - k : kLanes;
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      const V weights = load_some(w + c * w_row, n);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        sums[r][c] += select(mask_of(x, rows[r] + c * bits_row, k % 8, n), weights) * load(x + r * x_row);
      }
    }
    for (int r = 0; r < R; ++r) rows[r] += n / 8;
    x += n, w += n, k += n;
  }
  add_sums<T, R, C>(sums, y, y_row);
}

// Prefetches the bits that `count` rows of samples meet at some rows of W: each mask is read a few kilobytes at a time, too little
// for the processor to see that it is read in order.
METAMASK_INLINE void prefetch_bits(const uint8_t* const* bits, int64_t count, int64_t offset, int64_t row, int64_t outputs,
                                   int64_t columns) {
  for (int r = 0; r < kRows && r < count; ++r) {
    for (int c = 0; c < kOutputs && c < outputs; ++c) {
      const uint8_t* from = bits[r] + offset + c * row;
      for (int64_t byte = 0; byte < columns / 8; byte += kRowBytes) __builtin_prefetch(from + byte);
    }
  }
}

template <class T, bool kFinite>
METAMASK_INLINE void forward_rows(const T* x, int64_t x_row, BitRows bits, const T* w, int64_t w_row, const T* next, T* y,
                                  int64_t y_row, int64_t rows, int64_t outputs, int64_t columns) {
  // A few rows of x stay in the first-level cache while the tile of W streams from the second, and each mask is read in order. Each
  // group of rows prefetches its share of the next tile of W, and the bits of the next group; the last group those of the first
  // group in the next tile. Otherwise all arithmetic would wait where a tile begins.
  if (rows == 0) return;
  const auto divide = [](int64_t n, int64_t by) { return by == 0 ? 0 : (n + by - 1) / by; };
  const int64_t wanted = next == nullptr ? 0 : outputs * w_row * int64_t(sizeof(T)) / kRowBytes;
  const int64_t steps = columns / kStep<T, kFinite>;
  const int64_t lines = divide(wanted, divide(rows, kRows) * divide(outputs, kOutputs) * steps);
  int64_t asked = 0;
  for (int64_t i = 0; i < rows; i += kRows) {
    with_count<kRows>(rows - i, [&](auto r) {
      for (int64_t j = 0; j < outputs; j += kOutputs) {
        if (i + kRows < rows) {
          prefetch_bits(bits.bits + i + kRows, rows - i - kRows, bits.offset + j * bits.row, bits.row, outputs - j, columns);
        } else if (next != nullptr) {
          prefetch_bits(bits.bits, rows, bits.offset + (outputs + j) * bits.row, bits.row, outputs - j, columns);
        }
        const Ahead ahead{reinterpret_cast<const char*>(next) + asked * kRowBytes, asked + steps * lines <= wanted ? lines : 0};
        asked += steps * ahead.lines;
        with_count<kOutputs>(outputs - j, [&](auto c) {
          forward_tile<T, kFinite, decltype(r)::kValue, decltype(c)::kValue>(x + i * x_row, x_row, bits.bits + i,
                                                                             bits.offset + j * bits.row, bits.row, w + j * w_row,
                                                                             w_row, y + i * y_row + j, y_row, columns, ahead);
        });
      }
    });
  }
}

template <class T>
void forward(const T* x, int64_t x_row, bool finite, BitRows bits, const T* w, int64_t w_row, const T* next, T* y, int64_t y_row,
             int64_t rows, int64_t outputs, int64_t columns) {
  if constexpr (kPairs<T>) {
    if (finite) return forward_rows<T, true>(x, x_row, bits, w, w_row, next, y, y_row, rows, outputs, columns);
  }
  forward_rows<T, false>(x, x_row, bits, w, w_row, next, y, y_row, rows, outputs, columns);
}

// C vectors of columns from k on; `n` of them, less than a vector, where they are the last.
template <class T, int R, int C, bool kLast>
METAMASK_INLINE void input_gradient_tile(const T* dy, int64_t dy_row, const uint8_t* const* bits, int64_t offset, int64_t bits_row,
                                         const T* w, int64_t w_row, T* dx, int64_t dx_row, int64_t outputs, int64_t k, int64_t n) {
  using V = typename Vector<T>::type;
  constexpr int64_t kLanes = Vector<T>::kLanes;
  V sums[R][C];
  const uint8_t* rows[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    rows[r] = bits[r] + offset;
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) sums[r][c] = load(dx + r * dx_row + k + c * kLanes);
  }
  for (int64_t j = 0; j < outputs; ++j) {
    V weights[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      const T* from = w + j * w_row + k + c * kLanes;
      weights[c] = kLast ? load_some(from, n) : load(from);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V factor = everywhere(dy[r * dy_row + j]);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) {
        const uint8_t* row = rows[r] + j * bits_row;
        const auto mask = kLast ? mask_of(dy, row, k, n) : mask_of(dy, row, k + c * kLanes);
        sums[r][c] += select(mask, weights[c]) * factor;
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) store(dx + r * dx_row + k + c * kLanes, sums[r][c]);
  }
}

template <class T>
void input_gradient(const T* dy, int64_t dy_row, BitRows bits, const T* w, int64_t w_row, T* dx, int64_t dx_row, int64_t rows,
                    int64_t outputs, int64_t columns) {
  constexpr int64_t kLanes = Vector<T>::kLanes;
  const int64_t whole = columns / kLanes * kLanes;
  for (int64_t i = 0; i < rows; i += kRows) {
    with_count<kRows>(rows - i, [&](auto r) {
      const T* some = dy + i * dy_row;
      for (int64_t k = 0; k < whole; k += kColumns * kLanes) {
        with_count<kColumns>((whole - k) / kLanes, [&](auto c) {
          input_gradient_tile<T, decltype(r)::kValue, decltype(c)::kValue, false>(
              some, dy_row, bits.bits + i, bits.offset, bits.row, w, w_row, dx + i * dx_row, dx_row, outputs, k, 0);
        });
      }
      if (whole < columns) {
        input_gradient_tile<T, decltype(r)::kValue, 1, true>(some, dy_row, bits.bits + i, bits.offset, bits.row, w, w_row,
                                                             dx + i * dx_row, dx_row, outputs, whole, columns - whole);
      }
    });
  }
}

// Here R counts rows of dw, and the sum runs over the samples.
template <class T, int R, int C, bool kLast>
METAMASK_INLINE void weight_gradient_tile(const T* dy, int64_t dy_row, BitRows bits, const T* x, int64_t x_row, T* dw,
                                          int64_t dw_row, int64_t rows, int64_t k, int64_t n) {
  using V = typename Vector<T>::type;
  constexpr int64_t kLanes = Vector<T>::kLanes;
  V sums[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) sums[r][c] = load(dw + r * dw_row + k + c * kLanes);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const uint8_t* its = bits.bits[i] + bits.offset;
    V inputs[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) inputs[c] = load(x + i * x_row + k + c * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V factor = everywhere(dy[i * dy_row + r]);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) {
        const uint8_t* row = its + r * bits.row;
        const auto mask = kLast ? mask_of(dy, row, k, n) : mask_of(dy, row, k + c * kLanes);
        add_product(sums[r][c], mask, factor, inputs[c]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) store(dw + r * dw_row + k + c * kLanes, sums[r][c]);
  }
}

template <class T>
void weight_gradient(const T* dy, int64_t dy_row, BitRows bits, const T* x, int64_t x_row, T* dw, int64_t dw_row, int64_t rows,
                     int64_t outputs, int64_t columns) {
  constexpr int64_t kLanes = Vector<T>::kLanes;
  const int64_t whole = columns / kLanes * kLanes;
  for (int64_t j = 0; j < outputs; j += kRows) {
    const BitRows some{bits.bits, bits.offset + j * bits.row, bits.row};
    with_count<kRows>(outputs - j, [&](auto r) {
      for (int64_t k = 0; k < whole; k += kColumns * kLanes) {
        with_count<kColumns>((whole - k) / kLanes, [&](auto c) {
          weight_gradient_tile<T, decltype(r)::kValue, decltype(c)::kValue, false>(dy + j, dy_row, some, x, x_row, dw + j * dw_row,
                                                                                   dw_row, rows, k, 0);
        });
      }
      if (whole < columns) {
        weight_gradient_tile<T, decltype(r)::kValue, 1, true>(dy + j, dy_row, some, x, x_row, dw + j * dw_row, dw_row, rows, whole,
                                                              columns - whole);
      }
    });
  }
}

template <class T>
void expand(const uint8_t* bits, int64_t bits_row, const T* w, int64_t w_row, T* theta, int64_t theta_row, int64_t outputs,
            int64_t columns) {
  constexpr int64_t kLanes = Vector<T>::kLanes, kPad = Vector<T>::kPad;
  for (int64_t j = 0; j < outputs; ++j) {
    const uint8_t* row = bits + j * bits_row;
    const T* from = w + j * w_row;
    T* to = theta + j * theta_row;
    int64_t k = 0;
    for (; k + kLanes <= columns; k += kLanes) store(to + k, select(mask_of(from, row, k), load(from + k)));
    if (const int64_t n = columns - k; n > 0) {
      store(to + k, select(mask_of(from, row, k, n), load_some(from + k, n)));
      k += kLanes;
    }
    for (; k % kPad != 0; k += kLanes) store(to + k, typename Vector<T>::type{});
  }
}

// The padding of g, which is zero, is added too.
template <class T>
void add_masked(const uint8_t* bits, int64_t bits_row, const T* g, int64_t g_row, T* dw, int64_t dw_row, int64_t outputs,
                int64_t columns) {
  constexpr int64_t kLanes = Vector<T>::kLanes;
  for (int64_t j = 0; j < outputs; ++j) {
    const uint8_t* row = bits + j * bits_row;
    const T* from = g + j * g_row;
    T* to = dw + j * dw_row;
    for (int64_t k = 0; k < columns; k += kLanes) {
      const int64_t n = columns - k;
      const auto mask = n < kLanes ? mask_of(from, row, k, n) : mask_of(from, row, k);
      store(to + k, load(to + k) + select(mask, load(from + k)));
    }
  }
}

template <class T, class S>
METAMASK_INLINE void widen_all(const void* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = T(widen(static_cast<const S*>(from)[i]));
}

template <class T, class S>
METAMASK_INLINE void narrow_all(const T* from, void* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) narrow(float(from[i]), static_cast<S*>(to)[i]);
}

template <class T>
void widen_as(Type from, const void* w, T* to, int64_t n) {
  switch (from) {
    case Type::kBFloat16: return widen_all<T, BFloat16>(w, to, n);
    case Type::kFloat16: return widen_all<T, Float16>(w, to, n);
    default: __builtin_memcpy(to, w, n * sizeof(T));
  }
}

template <class T>
void narrow_as(const T* from, Type to, void* w, int64_t n) {
  switch (to) {
    case Type::kBFloat16: return narrow_all<T, BFloat16>(from, w, n);
    case Type::kFloat16: return narrow_all<T, Float16>(from, w, n);
    default: __builtin_memcpy(w, from, n * sizeof(T));
  }
}

}  // namespace

#define KERNELS(T) {&forward<T>, &input_gradient<T>, &weight_gradient<T>, &expand<T>, &add_masked<T>, &widen_as<T>, &narrow_as<T>}
const Packed METAMASK_TABLE(kPacked) = {KERNELS(float), KERNELS(double)};

}  // namespace metamask::cpu
