// Compiled once for each instruction set, with METAMASK_ISA its name. Everything but the table is local to the object.
//
// Of four neighbouring weights' products the sums of all 16 subsets are tabled once, and the four bits of each task pick theirs:
// one load and addition for four weights of a vector of samples, where a masked sum would take four.
#include "superposition_kernel.h"

#include "mask_vector.h"

namespace metamask::cpu {
namespace {

constexpr int kFour = 4, kSubsets = 16;
constexpr int kFours = kWord / kFour;  // their tables fill a third of 48 KiB

template <class T>
struct Tables {
  alignas(64) T of[kFours][kSubsets][kLanes<T>];
};

// The products of `n` columns of one row of W, those up to a whole four being zero.
template <class T>
METAMASK_INLINE void multiply(const T* dy, int64_t dy_row, const T* x, int64_t x_row, const T* w, T* products, int64_t rows,
                              int64_t n) {
  using V = typename Vector<T>::type;
  for (int64_t k = 0; k < n; ++k) {
    for (int64_t l = 0; l < kLanes<T>; l += Vector<T>::kLanes) {
      V total = load(dy + l) * load(x + k * kLanes<T> + l);
      for (int64_t r = 1; r < rows; ++r) total += load(dy + r * dy_row + l) * load(x + r * x_row + k * kLanes<T> + l);
      store(products + k * kLanes<T> + l, total * everywhere(w[k]));
    }
  }
  for (int64_t i = n * kLanes<T>; i % (kFour * kLanes<T>) != 0; ++i) products[i] = T(0);
}

// Entry i of a four's table is the sum of its products whose bits are set in i.
template <class T>
METAMASK_INLINE void build(const T* products, Tables<T>& tables, int64_t fours) {
  using V = typename Vector<T>::type;
  for (int64_t four = 0; four < fours; ++four, products += kFour * kLanes<T>) {
    for (int64_t l = 0; l < kLanes<T>; l += Vector<T>::kLanes) {
      V sums[kSubsets] = {};
#pragma GCC unroll 4
      for (int i = 0; i < kFour; ++i) {
        const V product = load(products + i * kLanes<T> + l);
#pragma GCC unroll 8
        for (int j = 0; j < 1 << i; ++j) sums[j + (1 << i)] = sums[j] + product;
      }
#pragma GCC unroll 16
      for (int j = 0; j < kSubsets; ++j) store(tables.of[four][j] + l, sums[j]);
    }
  }
}

template <class T>
METAMASK_INLINE void look_up(const Tables<T>& tables, uint64_t word, T* sums, int64_t fours) {
  using V = typename Vector<T>::type;
  constexpr int kParts = kLanes<T> / Vector<T>::kLanes;
  // Two sums each, so that an addition need not wait for the last one.
  V even[kParts], odd[kParts] = {};
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) even[p] = load(sums + p * Vector<T>::kLanes);
#pragma GCC unroll 16
  for (int64_t four = 0; four < fours; ++four) {
    const T* entry = tables.of[four][word >> (kFour * four) & (kSubsets - 1)];
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) (four % 2 == 0 ? even : odd)[p] += load(entry + p * Vector<T>::kLanes);
  }
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) store(sums + p * Vector<T>::kLanes, even[p] + odd[p]);
}

template <class T>
void add(const T* dy, int64_t dy_row, const T* x, int64_t x_row, const T* w, int64_t w_row, const uint64_t* words, T* sums,
         int64_t rows, int64_t tasks, int64_t outputs, int64_t columns) {
  alignas(64) T products[kWord * kLanes<T>];
  Tables<T> tables;
  if (rows == 0) return;
  for (int64_t k = 0; k < columns; k += kWord) {
    const int64_t n = columns - k < kWord ? columns - k : kWord, fours = (n + kFour - 1) / kFour;
    for (int64_t j = 0; j < outputs; ++j, words += tasks) {
      multiply(dy + j * kLanes<T>, dy_row, x + k * kLanes<T>, x_row, w + j * w_row + k, products, rows, n);
      build(products, tables, fours);
      if (n == kWord) {
        for (int64_t t = 0; t < tasks; ++t) look_up(tables, words[t], sums + t * kLanes<T>, kFours);
      } else {
        for (int64_t t = 0; t < tasks; ++t) look_up(tables, words[t], sums + t * kLanes<T>, fours);
      }
    }
  }
}

}  // namespace

#define TABLE_NAME_(isa) kSuperposition_##isa
#define TABLE_NAME(isa) TABLE_NAME_(isa)
const Superposition TABLE_NAME(METAMASK_ISA) = {{&add<float>}, {&add<double>}};

}  // namespace metamask::cpu
