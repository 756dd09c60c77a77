// masked_weight and its derivatives on the CPU: instruction set and threads. The loops are in masked_weight_kernel.cpp.
#include "../masked_weight.h"

#include <ATen/Parallel.h>

#include "capability.h"
#include "masked_weight_kernel.h"

namespace metamask::cpu {
namespace {

// Elements a thread takes at the least: about 10 microseconds of work, a few times what waking it costs.
constexpr int64_t kGrain = 16384;

const MaskedWeightKernels& kernels() {
#if defined(METAMASK_X86)
  switch (capability()) {
    case Capability::kAvx512: return kMaskedWeight_avx512;
    case Capability::kAvx2: return kMaskedWeight_avx2;
    default: break;
  }
#endif
  return kMaskedWeight_default;
}

struct Cpu {
  struct Guard {
    explicit Guard(const at::Tensor&) {}
  };

  static void forward(Gate gate, Type param, Type out, const void* w, const void* m, void* theta, int64_t n) {
    at::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {  //
      kernels().forward(gate, param, out, w, m, theta, begin, end);
    });
  }

  static void backward(Gate gate, Type param, Type grad, const void* g, const void* w, const void* m, void* dw, void* dm,
                       int64_t n) {
    at::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {  //
      kernels().backward(gate, param, grad, g, w, m, dw, dm, begin, end);
    });
  }

  static void double_backward(Gate gate, Type param, Type grad, const void* a, const void* b, const void* g, const void* w,
                              const void* m, void* dg, void* dw, void* dm, int64_t n) {
    at::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
      kernels().double_backward(gate, param, grad, a, b, g, w, m, dg, dw, dm, begin, end);
    });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(metamask, CPU, library) { MaskedWeight<Cpu>::register_in(library); }

}  // namespace metamask::cpu
