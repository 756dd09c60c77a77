// Global memory: buffers that end just before an inaccessible page, known to the checker with their exact size.
#pragma once

#include <cstddef>
#include <string>

namespace cuda_on_cpu {

constexpr int kPoison = 0xff;  // NaN in every floating-point type

struct Cell;

struct Buffer {
  char* begin;
  size_t bytes;
  std::string name;
  bool initialised;       // it held values before any kernel wrote to it
  Cell* cells = nullptr;  // what the checker knows of each byte; made when first needed
};

// Memory of `bytes` bytes, filled with kPoison.
void* allocate(size_t bytes, bool initialised);
void release(void* memory);

// The buffer that holds the address; null: none.
Buffer* find_buffer(const void* address);
// find_buffer remembers the last ones that it found; a launch starts without.
void forget_cached_buffers();

// Where an address lies that no buffer holds, in words.
std::string beside_buffers(const void* address);

// While it lives, a fault inside a kernel (an invalid address, an instruction that the compiler put where behaviour is undefined)
// becomes the launch's Error.
class FaultCatcher {
 public:
  FaultCatcher();
  ~FaultCatcher();
};

}  // namespace cuda_on_cpu
