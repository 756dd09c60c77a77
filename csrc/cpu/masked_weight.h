// masked_weight on the CPU: the instruction set's kernels, and the Device of csrc/masked_weight.h.
#pragma once

#include <ATen/Parallel.h>
#include <sys/mman.h>

#include "../masked_weight.h"
#include "capability.h"
#include "masked_weight_kernel.h"

namespace metamask::cpu {

inline const MaskedWeightKernels& masked_weight_kernels() {
#if defined(METAMASK_X86)
  switch (capability()) {
    case Capability::kAvx512Bf16: return kMaskedWeight_avx512_bf16;
    case Capability::kAvx512: return kMaskedWeight_avx512;
    case Capability::kAvx2: return kMaskedWeight_avx2;
    default: break;
  }
#endif
  return kMaskedWeight_default;
}

// Elements a thread takes at the least: about 10 microseconds of work, a few times what waking it costs.
constexpr int64_t kGrain = 16384;

struct Cpu {
  struct Guard {
    explicit Guard(const at::Tensor&) {}
  };

  // Most of the time of writing a gradient of many megabytes is the system's, which clears each page of 4 KiB when it is first
  // touched; pages of 2 MiB are cleared eight times as fast (docs/cpu.md). A system without them ignores the advice.
  static at::Tensor gradient_like(const at::Tensor& parameter, at::MemoryFormat format = at::MemoryFormat::Preserve) {
    at::Tensor gradient = at::empty_like(parameter, format);
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t kPage = uintptr_t(2) << 20;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(gradient.const_data_ptr()), end = begin + gradient.nbytes();
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
    return gradient;
  }

  static void forward(Gate gate, Type param, Type out, const void* w, const void* m, void* theta, int64_t n) {
    at::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {  //
      masked_weight_kernels().forward(gate, param, out, w, m, theta, begin, end);
    });
  }

  static void backward(Gate gate, Type param, Type grad, const void* g, const void* w, const void* m, const Sink& dw,
                       const Sink& dm, int64_t n) {
    at::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {  //
      masked_weight_kernels().backward(gate, param, grad, g, w, m, nullptr, dw, dm, begin, end);
    });
  }

  static void double_backward(Gate gate, Type param, Type grad, const void* a, const void* b, const void* g, const void* w,
                              const void* m, void* dg, void* dw, void* dm, int64_t n) {
    at::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
      masked_weight_kernels().double_backward(gate, param, grad, a, b, g, w, m, dg, dw, dm, begin, end);
    });
  }
};

}  // namespace metamask::cpu
