// Runs a kernel launch on the CPU: one block after another, and in a block one fiber (a stack of its own) for each CUDA thread. A
// thread runs until it waits at a barrier or in a warp operation, or returns; then another one goes on. Nothing is concurrent, so
// that a run can be repeated exactly: what stands for concurrency is the order, chosen by the schedule.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>

#include "async.h"
#include "atomics.h"
#include "warp.h"

namespace cuda_on_cpu {

using Location = std::source_location;

std::string to_string(const Location& where);

// What a kernel did wrong. launch() throws it.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// kForward: threads in ascending order, each as far as it gets: the first warp is a whole phase ahead of the last.
// kRandomWarps: blocks in random order, and after each barrier the warps in random order, each as far as it gets.
enum class Schedule : int { kForward, kRandomWarps };

struct Settings {
  Schedule schedule = Schedule::kForward;
  uint64_t seed = 1;
};
Settings& settings();

// The blocks that a grid may have in y and in z: as many as a device takes, or fewer, to see which launches would need more.
unsigned& most_blocks();

enum class State { kReady, kAtBarrier, kInWarpOperation, kReturned };

struct Thread {
  uint3 index;
  int number;  // in its block
  State state;
  Location where;  // it waits
  AsyncCopies copies;
  Fences fences;
  char* stack = nullptr;
  void* stack_pointer = nullptr;

  int lane() const { return number % 32; }
  int warp() const { return number / 32; }
};

constexpr size_t kStackBytes = 128 * 1024;

struct Launch {
  void* kernel;  // its address, for its name
  dim3 grid, block;
  size_t shared_bytes;
  void (*entry)(const void* arguments);
  const void* arguments;
  size_t arguments_bytes;
};
void run(const Launch& launch);
const Launch& current_launch();
uint64_t launches();  // how many there were

// The thread that runs; null outside kernels.
Thread* running();
Thread& thread(int number);
Warp& warp_of(const Thread& thread);

// Counts barriers: two accesses of a block between which it advanced are ordered. `launch` and `block` are its values at the start
// of the launch and of the block.
struct Clock {
  uint32_t launch = 1, block = 1, now = 1;
};
const Clock& barrier_clock();

void wait_at_barrier(const Location& where);
void wait(State state, const Location& where);  // until another thread calls wake
void wake(Thread& thread);

// Ends the launch: a running thread is left where it stands.
[[noreturn]] void fail(const std::string& message);
// The same for kernels: what they call is compiled with them, and a string's own memory is not theirs.
[[noreturn]] void fail_assertion(const char* condition);

}  // namespace cuda_on_cpu
