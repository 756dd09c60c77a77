// What the check build looks for at every access of a kernel: memory that is not the device's, bounds, alignment, values that
// nothing has written, and races, in a block and between blocks. The compiler instruments the kernels as for ThreadSanitizer; its
// callbacks end here instead (libtsan is not linked), and compare the access with what a cell of shadow memory says of each byte.
#pragma once

#include <cstddef>

#include "memory.h"

namespace cuda_on_cpu {

enum class Access { kRead, kWrite, kAtomic, kStartCopy, kEndCopy };

// Does nothing in the fast build.
void check_access(const void* address, size_t bytes, Access access, const char* operation);

void free_shadow(Buffer& buffer);

}  // namespace cuda_on_cpu
