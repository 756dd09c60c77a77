#include "checker.h"

#include <link.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstring>

#include "scheduler.h"
#include "shared.h"

namespace cuda_on_cpu {

// The last access of one kind to a byte: by whom, and when on the clocks of barriers and of the warp's __syncwarp.
struct Stamp {
  uint32_t time = 0;  // 0: never
  uint16_t warp_time = 0;
  uint16_t who = 0;  // a thread's number, or one of the groups below
};

struct Cell {
  Stamp write, read;
  bool copying, written, atomic;  // the last write
};

namespace {

// Several readers since the last barrier: lanes of one warp (kLanesOf + warp), or threads of several warps.
constexpr uint16_t kLanesOf = 1024, kSeveralWarps = kLanesOf + 32;

bool checking = false;  // the check build sets it when it is loaded

int warp_of_group(uint16_t who) { return who >= kLanesOf ? who - kLanesOf : who / 32; }

// Whether nothing orders an earlier access before one that `self` makes now.
bool unordered(const Stamp& earlier, const Thread& self) {
  const Clock& clock = barrier_clock();
  if (earlier.time < clock.launch) return false;
  if (earlier.time < clock.block) return !ordered_by_fences(earlier.time, earlier.who, self);  // another block of this launch
  if (earlier.time < clock.now || earlier.who == self.number) return false;
  if (earlier.who == kSeveralWarps || warp_of_group(earlier.who) != self.warp()) return true;
  return earlier.warp_time == uint16_t(warp_of(self).syncs);
}

Stamp now(const Thread& self) { return {barrier_clock().now, uint16_t(warp_of(self).syncs), uint16_t(self.number)}; }

void note_read(Stamp& read, const Thread& self) {
  const Stamp before = read;
  read = now(self);
  if (before.time < read.time || before.who == read.who) return;
  if (before.who == kSeveralWarps || warp_of_group(before.who) != self.warp()) read.who = kSeveralWarps;
  else if (before.warp_time == read.warp_time) read.who = uint16_t(kLanesOf + self.warp());
}

std::string name_of(const Stamp& stamp) {
  if (stamp.time < barrier_clock().block) return "another block";
  if (stamp.who == kSeveralWarps) return "several warps";
  if (stamp.who >= kLanesOf) return "several threads of warp " + std::to_string(stamp.who - kLanesOf);
  return "thread " + std::to_string(stamp.who);
}

[[noreturn]] void report(const std::string& what, const Buffer& buffer, size_t offset, const char* operation) {
  fail(what + ": " + operation + " at byte " + std::to_string(offset) + " of " + buffer.name);
}

void check_byte(Cell& cell, const Thread& self, Access access, const Buffer& buffer, size_t offset, const char* operation) {
  const bool reads = access == Access::kRead;
  if (reads && cell.copying) report("a cp.async to it has not been waited for", buffer, offset, operation);
  if (reads && !cell.written && !buffer.initialised) report("uninitialised value", buffer, offset, operation);
  const bool both_atomic = access == Access::kAtomic && cell.atomic;
  if (!both_atomic && unordered(cell.write, self)) report("race with a write by " + name_of(cell.write), buffer, offset, operation);
  if (reads) {
    note_read(cell.read, self);
    return;
  }
  if (unordered(cell.read, self)) report("race with a read by " + name_of(cell.read), buffer, offset, operation);
  cell.write = now(self);
  cell.copying = access == Access::kStartCopy;
  cell.written = true;
  cell.atomic = access == Access::kAtomic;
}

size_t shadow_bytes(const Buffer& buffer) { return buffer.bytes * sizeof(Cell); }

void make_shadow(Buffer& buffer) {
  // Zero pages, taken when touched.
  void* memory = mmap(nullptr, shadow_bytes(buffer), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for the shadow of " + buffer.name);
  buffer.cells = static_cast<Cell*>(memory);
}

Buffer* find_shared(const char* p) {
  for (Buffer& array : shared_arrays()) {
    if (p >= array.begin && p < array.begin + array.bytes) return &array;
  }
  return nullptr;
}

// Constants and threadIdx, which lie in the library itself, and the launch's arguments may be read.
bool is_constant(const char* p) {
  struct Range {
    uintptr_t begin, end;
  };
  static const Range library = [] {
    Range found{};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* result) {
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& header = info->dlpi_phdr[i];
            if (header.p_type != PT_LOAD) continue;
            const uintptr_t begin = info->dlpi_addr + header.p_vaddr, end = begin + header.p_memsz;
            Range& range = *static_cast<Range*>(result);
            range = {range.begin == 0 ? begin : range.begin, end};
          }
          const Range range = *static_cast<Range*>(result);
          const uintptr_t inside = reinterpret_cast<uintptr_t>(&checking);
          if (inside >= range.begin && inside < range.end) return 1;
          *static_cast<Range*>(result) = {};
          return 0;
        },
        &found);
    return found;
  }();
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  if (address >= library.begin && address < library.end) return true;
  const char* arguments = static_cast<const char*>(current_launch().arguments);
  return p >= arguments && p < arguments + current_launch().arguments_bytes;
}

}  // namespace

void check_access(const void* address, size_t bytes, Access access, const char* operation) {
  Thread* self = running();
  if (!checking || self == nullptr) return;
  const char* p = static_cast<const char*>(address);
  if (p >= self->stack && p < self->stack + kStackBytes) return;
  Buffer* buffer = is_shared(p) ? find_shared(p) : find_buffer(p);
  if (buffer == nullptr) {
    if (access == Access::kRead && is_constant(p)) return;
    fail(std::string("out of bounds: ") + operation + ", " + (is_shared(p) ? "beyond a shared array" : beside_buffers(p)));
  }
  const size_t offset = size_t(p - buffer->begin);
  if (offset + bytes > buffer->bytes) report("out of bounds: " + std::to_string(bytes) + " bytes", *buffer, offset, operation);
  if (buffer->cells == nullptr) make_shadow(*buffer);
  for (size_t i = offset; i < offset + bytes; ++i) check_byte(buffer->cells[i], *self, access, *buffer, i, operation);
}

void free_shadow(Buffer& buffer) {
  if (buffer.cells != nullptr) munmap(buffer.cells, shadow_bytes(buffer));
  buffer.cells = nullptr;
}

namespace {

template <int kBytes>
void check_aligned(const void* p, Access access, const char* operation) {
  if (running() != nullptr && reinterpret_cast<uintptr_t>(p) % kBytes != 0) {
    fail(std::string("misaligned: ") + operation + " of " + std::to_string(kBytes) + " bytes");
  }
  check_access(p, kBytes, access, operation);
}

}  // namespace
}  // namespace cuda_on_cpu

// The callbacks of -fsanitize=thread.
extern "C" {

using cuda_on_cpu::Access;

#define ACCESSES(bytes)                                                                                      \
  void __tsan_read##bytes(void* p) { cuda_on_cpu::check_aligned<bytes>(p, Access::kRead, "read"); }          \
  void __tsan_write##bytes(void* p) { cuda_on_cpu::check_aligned<bytes>(p, Access::kWrite, "write"); }       \
  void __tsan_unaligned_read##bytes(void* p) { cuda_on_cpu::check_access(p, bytes, Access::kRead, "read"); } \
  void __tsan_unaligned_write##bytes(void* p) { cuda_on_cpu::check_access(p, bytes, Access::kWrite, "write"); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
#undef ACCESSES

void __tsan_read_range(void* p, size_t bytes) { cuda_on_cpu::check_access(p, bytes, Access::kRead, "read"); }
void __tsan_write_range(void* p, size_t bytes) { cuda_on_cpu::check_access(p, bytes, Access::kWrite, "write"); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
// Every instrumented object calls it when it is loaded.
void __tsan_init() { cuda_on_cpu::checking = true; }
}
