// The CUDA side of the library, csrc/cuda/*.h, registered for CPU tensors: between enter and leave every metamask op runs the
// CUDA kernels in the emulator, on tensors whose memory the emulator guards.
#include <c10/core/CPUAllocator.h>

#include <array>
#include <memory>

#include "cuda/masked_linear.h"
#include "cuda/packed.h"
#include "cuda/task_masked_linear.h"
#include "memory.h"

namespace cuda_on_cpu {
namespace {

// What torch or a test writes to a tensor is not seen: every tensor counts as initialised, and is full of NaN until it is written.
struct GuardedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = bytes == 0 ? nullptr : cuda_on_cpu::allocate(bytes, true);
    return {memory, memory, &free, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  static void free(void* memory) {
    if (memory != nullptr) release(memory);
  }
};

struct Entered {
  torch::Library library{torch::Library::IMPL, "metamask", c10::DispatchKey::CPU, __FILE__, __LINE__};
  c10::Allocator* allocator = c10::GetCPUAllocator();

  Entered() {
    static GuardedAllocator guarded;
    metamask::MaskedWeight<metamask::cuda::Cuda>::register_in(library);
    metamask::MaskedWeightList<metamask::cuda::Cuda>::register_in(library);
    metamask::MaskedLinear<metamask::cuda::CudaLinear>::register_in(library);
    metamask::TaskMaskedLinear<metamask::cuda::CudaTaskLinear>::register_in(library);
    metamask::cuda::CudaPacked::register_in(library);
    c10::SetCPUAllocator(&guarded);
  }
  // The library's end brings the CPU's own kernels back.
  ~Entered() { c10::SetCPUAllocator(allocator); }
};

std::unique_ptr<Entered> entered;

}  // namespace
}  // namespace cuda_on_cpu

extern "C" {
void cuda_on_cpu_enter() { cuda_on_cpu::entered = std::make_unique<cuda_on_cpu::Entered>(); }
void cuda_on_cpu_leave() { cuda_on_cpu::entered.reset(); }
}
