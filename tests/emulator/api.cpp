// The emulator's own functions for Python (tests/support/emulator.py).
#include "memory.h"
#include "planted.h"
#include "scheduler.h"

using namespace cuda_on_cpu;

extern "C" {

void cuda_on_cpu_set(int schedule, uint64_t seed) { settings() = {Schedule(schedule), seed}; }

void cuda_on_cpu_limit_grid(unsigned most) { most_blocks() = most; }

uint64_t cuda_on_cpu_launches() { return launches(); }

void* cuda_on_cpu_allocate(size_t bytes, int initialised) { return allocate(bytes, initialised != 0); }
void cuda_on_cpu_release(void* memory) { release(memory); }

// What was wrong, in words; null: nothing.
const char* cuda_on_cpu_run_planted(int bug, int kernel, float* out, const float* a, const float* b, int m, int n, int k) {
  static std::string message;
  try {
    run_planted(Bug(bug), {Kernel(kernel), out, a, b, m, n, k});
    return nullptr;
  } catch (const Error& error) {
    message = error.what();
    return message.c_str();
  }
}
}
