// cp.async. A copy is carried out when its thread waits for it, and not before; until then its destination is undefined. So a wait
// that is missing shows: in the results, and to the checker.
#pragma once

#include <cstddef>
#include <deque>
#include <vector>

namespace cuda_on_cpu {

struct Copy {
  void* to;
  const void* from;  // null: zeros
  size_t bytes;
};

// The copies of one thread: those since the last commit, and the committed groups, the oldest first.
struct AsyncCopies {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;

  bool empty() const { return open.empty() && groups.empty(); }
};

void start_copy(void* to, const void* from, size_t bytes, bool valid);
void commit_copies();
void wait_for_copies(int groups_left);

}  // namespace cuda_on_cpu
