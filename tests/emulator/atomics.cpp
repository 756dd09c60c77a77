#include "atomics.h"

#include <algorithm>
#include <map>

#include "checker.h"
#include "scheduler.h"

namespace cuda_on_cpu {
namespace {

// A fence of another block, and where this block has learned of it.
struct Learned {
  Point fence, at;
};

std::map<const void*, std::vector<Point>> words;  // the fences before the operations on each word, in this launch
std::vector<Learned> learned;                     // by the running block

Point now(const Thread& self) { return {barrier_clock().block, barrier_clock().now, uint16_t(self.number)}; }

}  // namespace

void start_launch_of_atomics() { words.clear(); }
void start_block_of_atomics() { learned.clear(); }

unsigned long long compare_and_swap(unsigned long long* at, unsigned long long expected, unsigned long long desired) {
  if (uintptr_t(at) % sizeof *at != 0) fail("misaligned: atomicCAS of 8 bytes");
  check_access(at, sizeof *at, Access::kAtomic, "atomicCAS");
  Fences& own = running()->fences;
  std::vector<Point>& word = words[at];
  own.met.insert(own.met.end(), word.begin(), word.end());
  if (own.last.block == barrier_clock().block) word.push_back(own.last);
  const unsigned long long was = *at;
  if (was == expected) *at = desired;
  return was;
}

void fence() {
  Fences& own = running()->fences;
  own.last = now(*running());
  for (const Point& one : own.met) learned.push_back({one, own.last});
  own.met.clear();
}

bool ordered_by_fences(uint32_t time, uint16_t who, const Thread& self) {
  return std::any_of(learned.begin(), learned.end(), [&](const Learned& one) {
    const bool before = time >= one.fence.block && (time < one.fence.time || (time == one.fence.time && who == one.fence.who));
    return before && (one.at.time < barrier_clock().now || one.at.who == self.number);
  });
}

}  // namespace cuda_on_cpu
