#include "memory.h"

#include <signal.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>

#include "checker.h"
#include "scheduler.h"

namespace cuda_on_cpu {
namespace {

constexpr size_t kPage = 4096, kAlignment = 64;

size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

// A page that must not be touched, whole pages with the memory at their end, and a page that must not be touched.
struct Mapping {
  char* begin;
  size_t bytes;
};

std::mutex lock;                                            // torch allocates from several threads
std::map<const char*, std::pair<Buffer, Mapping>> buffers;  // by where they begin

// The arrays of a kernel are few, the tensors of a process many.
constexpr int kCached = 8;
Buffer* cached[kCached];
int next_cached = 0;

bool holds(const Buffer& buffer, const char* p) { return p >= buffer.begin && p < buffer.begin + buffer.bytes; }

constexpr int kFaults[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
struct sigaction previous[32];

void on_fault(int signal, siginfo_t* info, void*) {
  if (running() == nullptr) {
    // Not a kernel's: the instruction runs again, and meets the handler that was there before.
    sigaction(signal, &previous[signal], nullptr);
    return;
  }
  if (signal == SIGSEGV || signal == SIGBUS) fail("invalid address, " + beside_buffers(info->si_addr));
  fail(signal == SIGILL ? "an index beyond a local array" : "a division by zero");
}

}  // namespace

void* allocate(size_t bytes, bool initialised) {
  const size_t body = round_up(bytes, kPage);
  void* mapped = mmap(nullptr, body + 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw Error("no memory for a buffer of " + std::to_string(bytes) + " bytes");
  char* begin = static_cast<char*>(mapped);
  mprotect(begin, kPage, PROT_NONE);
  mprotect(begin + kPage + body, kPage, PROT_NONE);
  std::memset(begin + kPage, kPoison, body);
  char* memory = begin + kPage + body - round_up(bytes, kAlignment);
  const std::lock_guard<std::mutex> guard(lock);
  buffers[memory] = {{memory, bytes, "a buffer of " + std::to_string(bytes) + " bytes", initialised}, {begin, body + 2 * kPage}};
  return memory;
}

void release(void* memory) {
  const std::lock_guard<std::mutex> guard(lock);
  const auto found = buffers.find(static_cast<char*>(memory));
  auto& [buffer, mapping] = found->second;
  free_shadow(buffer);
  munmap(mapping.begin, mapping.bytes);
  buffers.erase(found);
}

Buffer* find_buffer(const void* address) {
  const char* p = static_cast<const char*>(address);
  for (Buffer* buffer : cached) {
    if (buffer != nullptr && holds(*buffer, p)) return buffer;
  }
  const std::lock_guard<std::mutex> guard(lock);
  auto after = buffers.upper_bound(p);
  if (after == buffers.begin()) return nullptr;
  Buffer& buffer = std::prev(after)->second.first;
  if (!holds(buffer, p)) return nullptr;
  return cached[next_cached++ % kCached] = &buffer;
}

void forget_cached_buffers() { std::memset(cached, 0, sizeof cached); }

std::string beside_buffers(const void* address) {
  const char* p = static_cast<const char*>(address);
  const std::lock_guard<std::mutex> guard(lock);
  for (const auto& [begin, both] : buffers) {
    const auto& [buffer, mapping] = both;
    if (p >= mapping.begin && p < mapping.begin + mapping.bytes) {
      const int64_t past = p - (buffer.begin + buffer.bytes);
      return past >= 0 ? std::to_string(past) + " bytes after " + buffer.name
                       : std::to_string(buffer.begin - p) + " bytes before " + buffer.name;
    }
  }
  return "not in device memory";
}

FaultCatcher::FaultCatcher() {
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  // The handler leaves the fiber for good instead of returning: the signal must not stay blocked.
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  for (int signal : kFaults) sigaction(signal, &action, &previous[signal]);
}

FaultCatcher::~FaultCatcher() {
  for (int signal : kFaults) sigaction(signal, &previous[signal], nullptr);
}

}  // namespace cuda_on_cpu
