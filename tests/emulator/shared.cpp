#include "shared.h"

#include <sys/mman.h>

#include <cstring>
#include <vector>

#include "checker.h"
#include "scheduler.h"

namespace cuda_on_cpu {
namespace {

constexpr size_t kArenaBytes = 256 * 1024, kGap = 128;
const char kDynamicKey = 0;

struct Arena {
  char* begin = nullptr;
  size_t used = 0, arrays_bytes = 0;
  std::vector<const void*> keys;
  std::vector<Buffer> arrays;  // in the order of the keys
};
Arena arena;

void* add_array(const void* key, size_t bytes, const char* name) {
  arena.arrays_bytes += bytes;
  if (arena.arrays_bytes > kMaxSharedBytes) {
    fail("shared memory: " + std::to_string(arena.arrays_bytes) + " bytes, a block has at most " + std::to_string(kMaxSharedBytes));
  }
  char* place = arena.begin + arena.used;
  std::memset(place, kPoison, bytes);
  arena.keys.push_back(key);
  arena.arrays.push_back({place, bytes, name, false, nullptr});
  arena.used += (bytes + kGap - 1) / kGap * kGap + kGap;
  return place;
}

}  // namespace

void start_shared_memory(size_t dynamic_bytes) {
  if (arena.begin == nullptr) {
    void* memory = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw Error("no memory for shared memory");
    arena.begin = static_cast<char*>(memory);
  }
  for (Buffer& array : arena.arrays) free_shadow(array);
  arena.keys.clear();
  arena.arrays.clear();
  arena.used = kGap;
  arena.arrays_bytes = 0;
  if (dynamic_bytes > 0) add_array(&kDynamicKey, dynamic_bytes, "dynamic shared memory");
}

void* shared_array(const void* key, size_t bytes, const char* name) {
  for (size_t i = 0; i < arena.keys.size(); ++i) {
    if (arena.keys[i] == key) return arena.arrays[i].begin;
  }
  return add_array(key, bytes, name);
}

void* dynamic_shared_memory() {
  if (arena.keys.empty() || arena.keys[0] != &kDynamicKey) fail("the launch gave no dynamic shared memory");
  return arena.arrays[0].begin;
}

bool is_shared(const void* address) {
  const char* p = static_cast<const char*>(address);
  return p >= arena.begin && p < arena.begin + kArenaBytes;
}

std::span<Buffer> shared_arrays() { return arena.arrays; }

}  // namespace cuda_on_cpu
