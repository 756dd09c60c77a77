// packed_masked_linear: y_b = x_b theta_t^T with theta_t = where(bit_t, W, 0), where t is the task of row b. The floor is the bytes
// of W and an eighth of a byte for each weight and task of the batch.
//
// A warp holds a tile of W in registers and takes the rows of the batch one after the other. What it needs of a row, the bits of
// the tile in the mask of the row's task and a piece of x, comes through a ring of kStages stages in shared memory, which cp.async
// fills ahead; no warp waits for another one. With g = lane / 4 and t = lane % 4 a lane has columns 32 t to 32 t + 31 of rows
// g + 8 r of the tile: 32 columns are one word of a mask, the four words of a row's 128 columns one copy of 16 bytes. A weight
// whose bit is on costs a multiplication and addition; one whose bit is off is skipped.
#pragma once

#include <cmath>

#include "cuda/kernels/packed_sizes.cuh"
#include "cuda/kernels/vector_access.cuh"

namespace metamask::cuda {

constexpr int kPackedWarps = 4, kPackedBlock = 32 * kPackedWarps, kPackedResident = 3;  // blocks of a multiprocessor
constexpr int kWordBits = 32, kWords = 4, kStrip = kWords * kWordBits;                  // columns of a warp's tile of W
constexpr int kStages = 4, kRowsOfStage = 2, kRing = kStages * kRowsOfStage, kAhead = kRing - kRowsOfStage;

// Rows of W in a lane: 128 registers with its 32 columns.
template <class T>
constexpr int kPackedRows = 16 / int(sizeof(T));
template <class T>
constexpr int kPackedTile = 8 * kPackedRows<T>;
// The most rows of x in a block: their sums are 8 KB of shared memory for each warp.
template <class T>
constexpr int kPackedRoom = 256 / int(sizeof(T));

// A row of the batch: the mask of its task, and the group's part of x.
template <class T>
struct alignas(16) PackedRow {
  const uint8_t* mask;
  const T* x;
};

// What a warp needs of a row. kWhole: rows are whole strips, and those of the masks begin at a pack; else the 16 bytes of a row
// begin anywhere in their first word, and end in a fifth one. x: a pack for each of the four lanes of a row (its columns 32 t on),
// then their next ones: so the four lie in different banks.
template <class T, bool kWhole>
struct PackedStage {
  static constexpr int kPack = kPackBytes / int(sizeof(T)), kRowWords = kWords + !kWhole;
  static constexpr int kBitsBytes = 4 * kPackedTile<T> * kRowWords, kBytes = kBitsBytes + kStrip * int(sizeof(T));
  static constexpr int kStep = kBytes / int(sizeof(T)), kWordStep = kBytes / 4;  // from one row to the next in the ring
  alignas(kPackBytes) uint32_t bits[kPackedTile<T> * kRowWords];
  alignas(kPackBytes) T x[kStrip];
};

template <class T, bool kWhole>
struct PackedShared {
  PackedStage<T, kWhole> ring[kPackedWarps][kStages * kRowsOfStage];
  T sums[kPackedWarps][kPackedRoom<T>][32];  // lane 4 g + t has that of row g + 8 t; in float64 of row g + 8 (t % 2)
  PackedRow<T> rows[kPackedRoom<T>];
};

// How a launch is cut into blocks: windows of `room` rows x tiles x groups for each part of the columns, `columns_each`. The host
// divides: after a division of 64 bits, which is a call, a compiler takes what follows to be different in each thread.
struct PackedBlocks {
  int room;
  unsigned windows, tiles, groups;
  int64_t group_out, columns_each;
};

// Copies a strip of rows of the batch into the ring of a warp; each lane copies a row of bits and a part of x.
template <bool kAligned, bool kWhole, class T>
struct PackedFeed {
  using Stage = PackedStage<T, kWhole>;
  static constexpr int kPack = Stage::kPack, kEach = kAligned ? kPack : 1, kBytes = kEach * int(sizeof(T));
  int64_t bits_offset, mask_bytes;  // where the lane's row of bits begins in a mask, how many bytes a mask has
  int64_t x_offset, x_bytes;        // where the lane's part of x begins in a row, how many bytes a row has

  DEVICE_INLINE PackedFeed(const PackedSizes& sizes, int64_t first_row, int64_t end_row, int64_t strip) {
    const unsigned lane = threadIdx.x % 32;
    // Instead of a row beyond the last one the last one is taken again, for nobody.
    const int64_t row = IN_BOUNDS(first_row + lane < end_row) ? first_row + lane : end_row - 1;
    bits_offset = kept(row * sizes.row_bytes() + strip / 8);
    mask_bytes = sizes.out * sizes.row_bytes();
    x_offset = kept((strip + column_of(kEach * lane)) * int64_t(sizeof(T)));
    x_bytes = sizes.in * int64_t(sizeof(T));
  }

  // `bits` and `x` are the lane's places in the stage.
  DEVICE_INLINE void copy(uint32_t* bits, T* x, const PackedRow<T>& row) const {
    if (kPackedTile<T> == 32 || threadIdx.x % 32 < kPackedTile<T>) copy_bits(bits, row.mask);
#pragma unroll
    for (int i = 0; i < kStrip; i += 32 * kEach) {
      const int64_t from = x_offset + column_of(i) * int64_t(sizeof(T));
      cp_async<kBytes>(x + i, reinterpret_cast<const char*>(row.x) + from, kWhole || IN_BOUNDS(from < x_bytes));
    }
  }

 private:
  // Returns which column of a strip is element i of a stage's x.
  DEVICE_INLINE static unsigned column_of(unsigned i) {
    return kWordBits * (i / kPack % kWords) + kPack * (i / kPack / kWords) + i % kPack;
  }

  DEVICE_INLINE void copy_bits(uint32_t* to, const uint8_t* mask) const {
    if constexpr (kWhole) {
      cp_async<kPackBytes>(to, mask + bits_offset, true);
    } else {
      const int64_t first = bits_offset - int64_t(reinterpret_cast<uintptr_t>(mask + bits_offset) % 4);
      if IN_BOUNDS (first >= 0 && first + 4 * Stage::kRowWords <= mask_bytes) {
        for (int k = 0; k < Stage::kRowWords; ++k) cp_async<4>(to + k, mask + first + 4 * k, true);
      } else {  // near an end of the mask
#pragma unroll 1
        for (int k = 0; k < Stage::kRowWords; ++k) {
          uint32_t word = 0;
          for (int i = 0; i < 4; ++i) {
            const int64_t byte = first + 4 * k + i;
            if IN_BOUNDS (byte >= 0 && byte < mask_bytes) word |= uint32_t(mask[byte]) << 8 * i;
          }
          to[k] = word;
        }
      }
    }
  }
};

// A lane keeps its rows in the order in which the sums of a row's four lanes meet without a choice: its row i is g + 8 (i ^ t).
template <class T>
DEVICE_INLINE int row_of_tile(int i) {
  const int lane = int(threadIdx.x) % 32;
  return lane / 4 + 8 * (i ^ lane % 4 % kPackedRows<T>);
}

// Returns the sum of the four lanes of row_of_tile(0).
template <class T, int R>
DEVICE_INLINE T add_lanes(const T (&sums)[R]) {
  T half[R / 2];
  for (int i = 0; i < R / 2; ++i) half[i] = sums[2 * i] + __shfl_xor_sync(~0u, sums[2 * i + 1], 1);
  return half[0] + __shfl_xor_sync(~0u, half[R / 2 - 1], 2);
}

// Returns whether the warp's packs of x in the rows of a stage are finite; false too where their sum is not.
template <class Stage, class T>
DEVICE_INLINE bool all_finite(const T* pack) {
  T sum = -T(0);  // to add to it is no operation
  for (int s = 0; s < kRowsOfStage; ++s) {
    for (int i = 0; i < kStrip; i += 32 * Stage::kPack) {
      const auto some = *reinterpret_cast<const Pack<T, Stage::kPack>*>(pack + s * Stage::kStep + i);
      for (int j = 0; j < Stage::kPack; ++j) sum += some.value[j];
    }
  }
  return __all_sync(~0u, std::abs(sum) < T(INFINITY));
}

// Adds the products of a lane's part of W with its part of x to the sums of its rows. Two rows at a time, each with half of the
// bits of a byte, since a multiplication waits for the one before it into the same sum. One operation makes predicates of the low
// seven bits of a byte; the eighth ones of all rows are put side by side for another one.
template <class Stage, class T, int R>
DEVICE_INLINE void multiply_on(const uint32_t (&words)[R], const T (&w)[R][kWordBits], const T* x, T (&sums)[R]) {
  constexpr uint32_t kEach = 0x01010101;  // byte
  uint32_t mixed[R], eighths = 0;
  for (int r = 0; r < R; ++r) {
    mixed[r] = merge_bits(0x0f * kEach, words[r], words[r ^ 1]);
    eighths = r == 0 ? mixed[r] >> 7 : merge_bits(((1u << r) - 1) * kEach, eighths, mixed[r] >> (7 - r));
  }
#pragma unroll
  for (int j = 0; j < kWordBits; j += 8) {
    T of_x[8];
#pragma unroll
    for (int i = 0; i < 8; i += Stage::kPack) {
      const auto pack = *reinterpret_cast<const Pack<T, Stage::kPack>*>(x + kWords * (j + i));
      for (int k = 0; k < Stage::kPack; ++k) of_x[i + k] = pack.value[k];
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        multiply_add_if(mixed[r], 1u << (j + k), w[r][j + k], of_x[k], sums[r]);
        if (k < 3) multiply_add_if(mixed[r], 1u << (j + k + 4), w[r ^ 1][j + k + 4], of_x[k + 4], sums[r ^ 1]);
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) multiply_add_if(eighths, 1u << (j + r), w[r ^ 1][j + 7], of_x[7], sums[r ^ 1]);
  }
}

// A weight that is off is 0, and 0 times an x that is not finite is NaN: returns what multiply_on has skipped.
template <class Stage, class T, int R>
DEVICE_INLINE T multiply_off(const uint32_t (&words)[R], const T* x) {
  T sums[R] = {};
#pragma unroll 1
  for (int j = 0; j < kWordBits; ++j) {
    const T of_x = x[j / Stage::kPack * (kWords * Stage::kPack) + j % Stage::kPack];
#pragma unroll
    for (int r = 0; r < R; ++r) sums[r] += words[r] >> j & 1 ? T(0) : T(0) * of_x;
  }
  return add_lanes(sums);
}

// The windows of a tile run side by side, so that its W comes from memory once. With `split_k_sums` [parts, rows, out] the sums go
// there instead of y.
template <bool kAligned, bool kWhole, class P>
__global__ void __launch_bounds__(kPackedBlock, kWhole && sizeof(Compute<P>) == 4 ? kPackedResident : 2)
    packed_masked_linear_kernel(PackedSizes sizes, const int64_t* slots, const P* w, PerTask bits, const Compute<P>* bias,
                                PerTask bias_bits, const Compute<P>* x, Compute<P>* y, Compute<P>* split_k_sums,
                                PackedBlocks blocks) {
  using T = Compute<P>;
  constexpr int kRows = kPackedRows<T>, kTile = kPackedTile<T>;
  using Shared = PackedShared<T, kWhole>;
  DYN_SHARED(Shared, shared);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, t = lane % 4;
  const int64_t in = sizes.in;
  const unsigned tile = blockIdx.x / blocks.windows, of_group = tile / blocks.tiles, part = of_group / blocks.groups;
  const int64_t group = of_group % blocks.groups, end_row = (group + 1) * blocks.group_out;
  const int64_t first_row = group * blocks.group_out + int64_t(tile % blocks.tiles) * kTile;
  const int64_t window = int64_t(blockIdx.x % blocks.windows) * blocks.room, first = part * blocks.columns_each;
  const int64_t last = first + blocks.columns_each < in ? first + blocks.columns_each : in;
  const int count = int(sizes.rows - window < blocks.room ? sizes.rows - window : blocks.room);
  const int whole_stages = count + count % kRowsOfStage;  // a last row without a partner is computed twice
  for (int b = int(threadIdx.x); b < whole_stages; b += kPackedBlock) {
    const int64_t row = window + (b < count ? b : count - 1);
    shared->rows[b] = {bits_of(bits, sizes, slots, row / sizes.rows_per_sample), x + (row * sizes.groups + group) * in};
  }
  __syncthreads();
  // The lane's places in the first row of the ring, and its sum of the window's first row.
  using Stage = PackedStage<T, kWhole>;
  Stage& front = shared->ring[warp][0];
  T *const pack = kept(front.x + Stage::kPack * lane), *const sum = kept(shared->sums[warp][0] + lane);
  T* const to_x = kAligned ? pack : front.x + lane;
  uint32_t* const to_bits =
      kWhole ? reinterpret_cast<uint32_t*>(pack) - Stage::kBitsBytes / 4 : front.bits + Stage::kRowWords * lane;
  const T* const of_x = kept(front.x + Stage::kPack * t);
  const uint32_t* of_words[kRows];
  for (int r = 0; r < kRows; ++r) of_words[r] = kept(front.bits + Stage::kRowWords * row_of_tile<T>(r) + t);
  for (int b = 0; b < whole_stages; ++b) sum[32 * b] = 0;

  for (int64_t strip = first + warp * kStrip; __all_sync(~0u, strip < last); strip += kPackedWarps * kStrip) {
    const PackedFeed<kAligned, kWhole, T> feed(sizes, first_row, end_row, strip);
    const auto fetch = [&](bool there, unsigned b) {  // rows b and b + 1 of the window
      if (there) {
        const unsigned at = b % kRing;
        PackedRow<T> rows[kRowsOfStage];
        for (int s = 0; s < kRowsOfStage; ++s) rows[s] = shared->rows[b + s];
        for (int s = 0; s < kRowsOfStage; ++s) {
          feed.copy(to_bits + (at + s) * Stage::kWordStep, to_x + (at + s) * Stage::kStep, rows[s]);
        }
      }
      cp_async_commit();
    };
#pragma unroll
    for (unsigned b = 0; b < kAhead; b += kRowsOfStage) fetch(b < unsigned(count), b);
    T w_[kRows][kWordBits];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first_row + row_of_tile<T>(r), columns = IN_BOUNDS(row < end_row) ? in : 0;
      constexpr int kPack = kAligned ? kPackBytes / int(sizeof(P)) : 1;
#pragma unroll
      for (int j = 0; j < kWordBits; j += kPack) {
        T some[kPack];
        load<kPack, true>(w + row * in, strip + kWordBits * t + j, columns, some);
        for (int k = 0; k < kPack; ++k) w_[r][j + k] = some[k];
      }
    }
    T* sum_of = sum;
#pragma unroll 1
    for (unsigned b = 0; b < unsigned(count); b += kRowsOfStage, sum_of += 32 * kRowsOfStage) {
      cp_async_wait<kStages - 2>();
      __syncwarp();  // the copies of all lanes have arrived, and all have read what the next ones replace
      fetch(b + kAhead < unsigned(count), b + kAhead);
      const unsigned at = b % kRing;
      const auto words_of = [&](int s, uint32_t(&words)[kRows]) {
        for (int r = 0; r < kRows; ++r) {
          const uint32_t* const word = of_words[r] + (at + s) * Stage::kWordStep;
          words[r] = *word;
          if constexpr (!kWhole) {
            const uint8_t* const begin = shared->rows[b + s].mask + (first_row + row_of_tile<T>(r)) * sizes.row_bytes();
            words[r] = __funnelshift_r(words[r], word[1], 8 * unsigned(reinterpret_cast<uintptr_t>(begin) % 4));
          }
        }
      };
      uint32_t words[kRows];
      if (!all_finite<Stage>(pack + at * Stage::kStep)) {
#pragma unroll 1
        for (int s = 0; s < kRowsOfStage; ++s) {
          words_of(s, words);
          sum_of[32 * s] += multiply_off<Stage>(words, of_x + (at + s) * Stage::kStep);
        }
      }
#pragma unroll
      for (int s = 0; s < kRowsOfStage; ++s) {
        words_of(s, words);
        T of_rows[kRows] = {t < kRows ? sum_of[32 * s] : T(0)};  // in float64 two lanes have the same sum
        multiply_on<Stage>(words, w_, of_x + (at + s) * Stage::kStep, of_rows);
        sum_of[32 * s] = add_lanes(of_rows);
      }
    }
    cp_async_wait<0>();
    __syncwarp();  // all lanes have read what the next strip replaces
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < kTile * count; i += kPackedBlock) {
    const int b = i / kTile, of_tile = i % kTile;
    const int64_t row = first_row + of_tile;
    if (!IN_BOUNDS(row < end_row)) continue;
    T total = 0;
    for (int part_of = 0; part_of < kPackedWarps; ++part_of) total += shared->sums[part_of][b][of_tile % 8 * 4 + of_tile / 8];
    if (part == 0 && bias != nullptr) {
      const bool masked = bias_bits.first != nullptr || bias_bits.table != nullptr;
      const int64_t sample = (window + b) / sizes.rows_per_sample;
      if (!masked || (bits_of(bias_bits, sizes, slots, sample)[row / 8] >> (row % 8) & 1)) total += bias[row];
    }
    const int64_t to = (window + b) * sizes.out + row;
    if (split_k_sums != nullptr) split_k_sums[part * sizes.rows * sizes.out + to] = total;
    else y[to] = total;
  }
}

}  // namespace metamask::cuda
