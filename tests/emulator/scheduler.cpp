#include "scheduler.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#include "checker.h"
#include "device_index.h"
#include "memory.h"
#include "shared.h"

#if !defined(__x86_64__)
#error "the switch between fibers is written for x86-64"
#endif

// Saves the registers that a call must keep, and the stack pointer in *save; continues on the stack `to`, which a switch has left.
// (ucontext also saves the signal mask, with a system call: it takes 3 to 9 times as long.)
extern "C" void cuda_on_cpu_switch(void** save, void* to);
asm(R"(
.text
.globl cuda_on_cpu_switch
.hidden cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");

namespace cuda_on_cpu {
namespace {

struct Machine {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  std::vector<Thread*> ready;  // the last one runs next
  Thread* running = nullptr;
  void* stack_pointer = nullptr;  // of the scheduler, while a fiber runs
  int count = 0, live = 0, at_barrier = 0;
  Clock clock;
  uint64_t launches = 0;
  const Launch* launch = nullptr;
  std::string error;
  std::mt19937_64 random;
};

Machine machine;
std::mutex one_launch_at_a_time;

std::string describe(const Thread& thread) {
  const auto triple = [](uint3 i) { return std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z); };
  return "thread " + triple(thread.index) + " of block " + triple(blockIdx);
}

std::string kernel_name() {
  Dl_info info;
  if (dladdr(machine.launch->kernel, &info) == 0 || info.dli_sname == nullptr) return "a kernel without a visible name";
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> name(abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status),
                                                         &std::free);
  return status == 0 ? name.get() : info.dli_sname;
}

void switch_to_scheduler() { cuda_on_cpu_switch(&machine.running->stack_pointer, machine.stack_pointer); }

void switch_to(Thread& thread) {
  machine.running = &thread;
  threadIdx = thread.index;
  cuda_on_cpu_switch(&machine.stack_pointer, thread.stack_pointer);
  machine.running = nullptr;
}

// The first function on every fiber's stack. It never returns: the scheduler does not come back to a thread that has returned.
void run_thread() {
  machine.launch->entry(machine.launch->arguments);
  Thread& self = *machine.running;
  if (!self.copies.empty()) fail("returned with a cp.async that it has not waited for");
  Warp& warp = warp_of(self);
  for (int lane = 0; lane < 32; ++lane) {
    const Thread& other = *machine.threads[self.warp() * 32 + lane];
    if (warp.waits(lane) && (warp.lanes[lane].mask >> self.lane() & 1)) {
      fail("returned, while the mask of a warp operation at " + to_string(other.where) + " names it");
    }
  }
  self.state = State::kReturned;
  --machine.live;
  warp.live &= ~(1u << self.lane());
  switch_to_scheduler();
  std::abort();
}

// A stack as cuda_on_cpu_switch leaves it: six registers, then the address to return to.
void prepare(Thread& thread) {
  if (thread.stack == nullptr) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw Error("no memory for the stack of a thread");
    thread.stack = static_cast<char*>(stack);
    mprotect(thread.stack, 4096, PROT_NONE);  // a stack grows down
  }
  void** top = reinterpret_cast<void**>(thread.stack + kStackBytes - 64);
  *--top = nullptr;  // where run_thread would return to; it also makes the stack 8 beyond a multiple of 16, as after a call
  *--top = reinterpret_cast<void*>(&run_thread);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  thread.stack_pointer = top;
}

// Puts all ready threads in the schedule's order.
void order_ready() {
  std::vector<Thread*>& ready = machine.ready;
  if (settings().schedule == Schedule::kForward) {
    std::sort(ready.begin(), ready.end(), [](const Thread* a, const Thread* b) { return a->number > b->number; });
    return;
  }
  std::vector<uint64_t> rank(machine.warps.size());
  for (uint64_t& one : rank) one = machine.random();
  const bool descending = machine.random() & 1;
  std::sort(ready.begin(), ready.end(), [&](const Thread* a, const Thread* b) {
    if (a->warp() != b->warp()) return rank[a->warp()] < rank[b->warp()];
    return descending ? a->number < b->number : a->number > b->number;
  });
}

void release_barrier() {
  const auto first = std::find_if(machine.threads.begin(), machine.threads.end(),
                                  [](const auto& thread) { return thread->state == State::kAtBarrier; });
  const Location where = (*first)->where;
  if (machine.live != machine.count) {
    throw Error("barrier at " + to_string(where) + ": " + std::to_string(machine.count - machine.live) + " of " +
                std::to_string(machine.count) + " threads have returned and do not reach it");
  }
  for (int i = 0; i < machine.count; ++i) {
    Thread& thread = *machine.threads[i];
    if (!same_place(thread.where, where)) {
      throw Error("divergent barrier: threads wait at " + to_string(where) + ", and " + describe(thread) + " at " +
                  to_string(thread.where));
    }
    wake(thread);
  }
  machine.at_barrier = 0;
  ++machine.clock.now;
  order_ready();
}

[[noreturn]] void report_deadlock() {
  std::map<std::string, int> waiting;
  for (int i = 0; i < machine.count; ++i) {
    const Thread& thread = *machine.threads[i];
    if (thread.state == State::kAtBarrier) ++waiting["at the barrier " + to_string(thread.where)];
    else if (thread.state == State::kInWarpOperation) ++waiting["in the warp operation " + to_string(thread.where)];
    else ++waiting["returned"];
  }
  std::string message = "deadlock:";
  for (const auto& [what, count] : waiting) message += " " + std::to_string(count) + " threads " + what + ";";
  throw Error(message);
}

void run_block(uint3 index) {
  const dim3 size = machine.launch->block;
  blockIdx = index;
  machine.live = machine.count;
  machine.at_barrier = 0;
  machine.clock.block = ++machine.clock.now;
  machine.warps.assign(machine.count / 32, Warp{});
  machine.ready.clear();
  start_shared_memory(machine.launch->shared_bytes);
  start_block_of_atomics();
  for (int i = 0; i < machine.count; ++i) {
    Thread& thread = *machine.threads[i];
    const unsigned number = unsigned(i);
    thread.number = i;
    thread.index = {number % size.x, number / size.x % size.y, number / size.x / size.y};
    thread.copies = {};
    thread.fences = {};
    prepare(thread);
    wake(thread);
  }
  order_ready();
  while (machine.live > 0) {
    if (machine.ready.empty()) {
      if (machine.at_barrier != machine.live) report_deadlock();
      release_barrier();
    }
    Thread& next = *machine.ready.back();
    machine.ready.pop_back();
    switch_to(next);
    if (!machine.error.empty()) throw Error(machine.error);
  }
}

void check_limits(const Launch& launch) {
  const size_t threads = size_t(launch.block.x) * launch.block.y * launch.block.z;
  if (threads == 0 || threads > 1024) throw Error("a block has 1 to 1024 threads, got " + std::to_string(threads));
  // CUDA allows it; no kernel here needs it, and every warp being full keeps warp operations simple.
  if (threads % 32 != 0) throw Error("a block must be whole warps here, got " + std::to_string(threads) + " threads");
  const dim3 grid = launch.grid;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > most_blocks() || grid.z > most_blocks()) {
    const std::string most = std::to_string(most_blocks());
    throw Error("a grid has 1 to 2147483647 x " + most + " x " + most + " blocks, got " + std::to_string(grid.x) + " x " +
                std::to_string(grid.y) + " x " + std::to_string(grid.z));
  }
}

}  // namespace

std::string to_string(const Location& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

Settings& settings() {
  static Settings only;
  return only;
}

unsigned& most_blocks() {
  static unsigned most = 65535;
  return most;
}

void run(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  machine.launch = &launch;
  ++machine.launches;
  machine.error.clear();
  machine.running = nullptr;
  machine.clock.launch = ++machine.clock.now;
  machine.random.seed(settings().seed);
  gridDim = launch.grid;
  blockDim = launch.block;
  forget_cached_buffers();
  start_launch_of_atomics();
  const FaultCatcher faults;
  try {
    check_limits(launch);
    machine.count = int(launch.block.x * launch.block.y * launch.block.z);
    while (int(machine.threads.size()) < machine.count) machine.threads.push_back(std::make_unique<Thread>());
    std::vector<uint64_t> blocks(uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z);
    std::iota(blocks.begin(), blocks.end(), 0);
    if (settings().schedule == Schedule::kRandomWarps) std::shuffle(blocks.begin(), blocks.end(), machine.random);
    for (uint64_t i : blocks) {
      run_block(
          {unsigned(i % launch.grid.x), unsigned(i / launch.grid.x % launch.grid.y), unsigned(i / launch.grid.x / launch.grid.y)});
    }
  } catch (const Error& error) {
    throw Error(std::string(error.what()) + ", in " + kernel_name());
  }
}

const Launch& current_launch() { return *machine.launch; }
uint64_t launches() { return machine.launches; }
Thread* running() { return machine.running; }
Thread& thread(int number) { return *machine.threads[number]; }
Warp& warp_of(const Thread& thread) { return machine.warps[thread.warp()]; }
const Clock& barrier_clock() { return machine.clock; }

void wait(State state, const Location& where) {
  machine.running->state = state;
  machine.running->where = where;
  switch_to_scheduler();
}

void wait_at_barrier(const Location& where) {
  ++machine.at_barrier;
  wait(State::kAtBarrier, where);
}

void wake(Thread& thread) {
  thread.state = State::kReady;
  machine.ready.push_back(&thread);
}

void fail(const std::string& message) {
  if (machine.running == nullptr) throw Error(message);
  machine.error = describe(*machine.running) + ": " + message;
  switch_to_scheduler();
  std::abort();
}

void fail_assertion(const char* condition) { fail(std::string("assertion failed: ") + condition); }

}  // namespace cuda_on_cpu
