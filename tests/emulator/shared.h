// Shared memory: an arena in which each array has its place from the first thread of a block that asks for it until the block ends.
// Between the arrays lie gaps, so that the checker sees an access beyond one; every block finds it filled with NaN.
#pragma once

#include <cstddef>
#include <span>

#include "memory.h"

namespace cuda_on_cpu {

constexpr size_t kMaxSharedBytes = 99 * 1024;  // what a block has on every architecture from 8.6 on

void start_shared_memory(size_t dynamic_bytes);

// `key` tells arrays apart: each declaration has its own.
void* shared_array(const void* key, size_t bytes, const char* name);
void* dynamic_shared_memory();

bool is_shared(const void* address);
std::span<Buffer> shared_arrays();  // of the running block

}  // namespace cuda_on_cpu
