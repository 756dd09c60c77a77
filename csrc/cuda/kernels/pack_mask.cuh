// pack_mask and unpack_mask: between logits and masks of one bit a weight. A thread stores 16 bytes at once; where it is in a row
// it finds by one division.
#pragma once

#include "cuda/kernels/vector_access.cuh"

namespace metamask::cuda {

// A warp makes kPackBytes bytes for each of its lanes, in as many turns; in a turn neighbours make neighbours. kAligned: eight
// logits begin at a pack, and rows are whole bytes.
template <bool kAligned, class P>
__global__ void __launch_bounds__(kThreads)
    pack_mask_kernel(const P* logits, Compute<P> threshold, uint8_t* packed, int64_t rows, int64_t columns) {
  constexpr int kOfWarp = 32 * kPackBytes, kPack = kAligned ? kPackBytes / int(sizeof(P)) : 1;
  SHARED(uint8_t, made, [kThreads / 32][kOfWarp]);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t bytes = (columns + 7) / 8, n = rows * bytes, first = (int64_t(blockIdx.x) * (kThreads / 32) + warp) * kOfWarp;
  const int64_t rows_of_turn = 32 / bytes, rest_of_turn = 32 % bytes;
  int64_t row = (first + lane) / bytes, k = (first + lane) % bytes;
  for (int turn = 0; turn < kPackBytes; ++turn) {
    if (!IN_BOUNDS(row < rows)) break;
    unsigned byte = 0;
    for (int j = 0; j < 8; j += kPack) {
      const Pack<P, kPack> some = load_pack<kPack, true>(logits + row * columns, 8 * k + j, columns);
      for (int i = 0; i < kPack; ++i) {
        const bool there = kAligned || IN_BOUNDS(8 * k + j < columns);
        byte |= unsigned(there && to_compute(some.value[i]) > threshold) << (j + i);
      }
    }
    made[warp][32 * turn + lane] = uint8_t(byte);
    row += rows_of_turn;
    k += rest_of_turn;
    if (k >= bytes) {
      k -= bytes;
      ++row;
    }
  }
  __syncwarp();
  const int64_t at = first + kPackBytes * lane;
  const uint8_t* const own = &made[warp][kPackBytes * lane];
  if IN_BOUNDS (at + kPackBytes <= n) {
    store_bytes<kPackBytes>(packed + at, own);
  } else {
    for (int i = 0; i < kPackBytes; ++i) {
      if IN_BOUNDS (at + i < n) packed[at + i] = own[i];
    }
  }
}

// A thread makes kPackBytes elements. kWhole: rows are whole bytes, so that the bits of all of them are one row.
template <bool kWhole>
__global__ void __launch_bounds__(kThreads) unpack_mask_kernel(const uint8_t* packed, bool* mask, int64_t rows, int64_t columns) {
  const int64_t n = rows * columns, at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kPackBytes;
  if (!IN_BOUNDS(at < n)) return;
  unsigned bits = 0;
  if constexpr (kWhole) {
    bits = packed[at / 8];
    if IN_BOUNDS (at + 8 < n) bits |= unsigned(packed[at / 8 + 1]) << 8;
  } else {
    const int64_t bytes = (columns + 7) / 8;
    int64_t row = at / columns, k = at % columns;
    unsigned byte = packed[row * bytes + k / 8];
    for (int i = 0; i < kPackBytes; ++i) {
      bits |= (byte >> (k % 8) & 1) << i;
      if (++k == columns) {
        k = 0;
        ++row;
      }
      if IN_BOUNDS (k % 8 == 0 && row < rows) byte = packed[row * bytes + k / 8];
    }
  }
  // Each of four bits to a byte of its own.
  uint32_t elements[kPackBytes / 4];
  for (int i = 0; i < kPackBytes / 4; ++i) elements[i] = (bits >> (4 * i) & 0xf) * 0x00204081u & 0x01010101u;
  if IN_BOUNDS (at + kPackBytes <= n) {
    store_bytes<kPackBytes>(mask + at, elements);
  } else {
    for (int i = 0; i < kPackBytes; ++i) {
      if IN_BOUNDS (at + i < n) mask[at + i] = bits >> i & 1;
    }
  }
}

}  // namespace metamask::cuda
