#include "async.h"

#include <cstdint>
#include <cstring>

#include "checker.h"
#include "memory.h"
#include "scheduler.h"
#include "shared.h"

namespace cuda_on_cpu {

void start_copy(void* to, const void* from, size_t bytes, bool valid) {
  if (!is_shared(to)) fail("cp.async: the destination is not in shared memory");
  if (uintptr_t(to) % bytes != 0) fail("cp.async: the destination is not aligned to " + std::to_string(bytes) + " bytes");
  if (valid && uintptr_t(from) % bytes != 0) fail("cp.async: the source is not aligned to " + std::to_string(bytes) + " bytes");
  check_access(to, bytes, Access::kStartCopy, "cp.async");
  if (valid) check_access(from, bytes, Access::kRead, "cp.async");
  std::memset(to, kPoison, bytes);
  running()->copies.open.push_back({to, valid ? from : nullptr, bytes});
}

void commit_copies() {
  AsyncCopies& copies = running()->copies;
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}

void wait_for_copies(int groups_left) {
  AsyncCopies& copies = running()->copies;
  while (int(copies.groups.size()) > groups_left) {
    for (const Copy& copy : copies.groups.front()) {
      if (copy.from != nullptr) std::memcpy(copy.to, copy.from, copy.bytes);
      else std::memset(copy.to, 0, copy.bytes);
      check_access(copy.to, copy.bytes, Access::kEndCopy, "cp.async");
    }
    copies.groups.pop_front();
  }
}

}  // namespace cuda_on_cpu
