// Operations of a warp as a whole. There is one mechanism: each lane deposits where its inputs and outputs are, and waits; the last
// one to arrive computes for all of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <source_location>
#include <string>

namespace cuda_on_cpu {

using Location = std::source_location;

struct Lane {
  const void* in;
  void* out;
  unsigned mask;
};

struct Warp {
  unsigned live = ~0u;   // lanes that have not returned
  unsigned arrived = 0;  // lanes that wait in an operation
  uint32_t syncs = 0;    // how many __syncwarp are done: what orders the lanes' accesses
  const char* operation = nullptr;
  Location where;
  Lane lanes[32];

  bool waits(int lane) const { return arrived >> lane & 1; }
};

bool same_place(const Location& a, const Location& b);

// Every lane of `mask` must call this with the same mask, operation and place. `compute` gets the lanes and the mask.
void together(unsigned mask, const char* operation, const Location& where, const void* in, void* out,
              void (*compute)(unsigned mask, Lane (&lanes)[32]));

void sync_warp(unsigned mask, const Location& where);

// `value` of the lane `source`; that of a lane which is not in the mask is undefined, here all bits set (NaN). It is copied by
// code that the checker does not see: it is another thread's.
void shuffle_bytes(unsigned mask, const void* value, void* out, size_t bytes, int source, const char* operation,
                   const Location& where);

template <class T>
T shuffle(unsigned mask, T value, int source, const char* operation, const Location& where) {
  T out;
  shuffle_bytes(mask, &value, &out, sizeof(T), source, operation, where);
  return out;
}

bool all_of_warp(unsigned mask, bool predicate, const Location& where);

int current_lane();

// mma.sync: c += a b with fragments laid out as in the PTX ISA, "Matrix Fragments for mma.m16n8k8 / m16n8k16".
enum class Factor { kTf32, kBFloat16, kFloat16 };
void multiply(Factor factor, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Location& where);

}  // namespace cuda_on_cpu
