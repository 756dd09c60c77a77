// Atomic operations on global memory, and __threadfence. Blocks run one after another, so an operation is atomic as it is; what is
// kept is the order that it makes between accesses of different blocks: what a thread did, or had seen of its block through a
// barrier, before its fence before an atomic operation, comes before what it, or its block through a barrier, does after its fence
// after a later atomic operation on the same word.
#pragma once

#include <cstdint>
#include <vector>

namespace cuda_on_cpu {

struct Thread;

// A point in the run of a block: `time` and `block` on the clock of barriers (scheduler.h), `who` is a thread's number.
struct Point {
  uint32_t block = 0, time = 0;
  uint16_t who = 0;
};

// Of one thread: its last fence, and the fences of other blocks whose effect it has met in a word since its own.
struct Fences {
  Point last;
  std::vector<Point> met;
};

void start_launch_of_atomics();
void start_block_of_atomics();

unsigned long long compare_and_swap(unsigned long long* at, unsigned long long expected, unsigned long long desired);
void fence();

// Whether an access at `earlier`, of another block, comes before one that `self` makes now.
bool ordered_by_fences(uint32_t time, uint16_t who, const Thread& self);

}  // namespace cuda_on_cpu
