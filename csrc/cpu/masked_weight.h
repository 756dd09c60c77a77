// masked_weight on the CPU: the kernels of the instruction set in use, and the Device of ops/masked_weight.h.
#pragma once

#include <ATen/Parallel.h>
#include <sys/mman.h>

#include <algorithm>

#include "cpu/capability.h"
#include "cpu/kernels/masked_weight.h"
#include "ops/masked_weight.h"
#include "ops/masked_weight_list.h"

namespace metamask::cpu {

inline const MaskedWeightKernels& masked_weight_kernels() { return METAMASK_CHOSEN_TABLE(kMaskedWeight); }

// A thread takes at least this many elements: about 10 microseconds of work, a few times what waking it costs.
constexpr int64_t kGrain = 16384;

struct Cpu {
  struct Guard {
    explicit Guard(const at::Tensor&) {}
  };

  // Asks for pages of 2 MiB. Writing a gradient of many megabytes spends most of its time in the system, which clears each page of
  // 4 KiB when it is first touched, and clears large pages eight times as fast (docs/internals/performance.md). A system without
  // large pages ignores the advice.
  static at::Tensor gradient_like(const at::Tensor& parameter, at::MemoryFormat format = at::MemoryFormat::Preserve) {
    at::Tensor gradient = at::empty_like(parameter, format);
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t kPage = uintptr_t(2) << 20;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data_in_order("gradient", gradient, gradient)),
                    end = begin + gradient.nbytes();
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
    return gradient;
  }

  static void forward(Gate gate, ParamTypes types, Type out, const void* w, const void* m, void* theta, int64_t n) {
    at::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {  //
      masked_weight_kernels().forward(gate, types, out, w, m, theta, begin, end);
    });
  }

  static void backward(Gate gate, ParamTypes types, Type grad, const void* g, const void* w, const void* m, const Sink& dw,
                       const Sink& dm, int64_t n, void* theta = nullptr) {
    at::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {  //
      masked_weight_kernels().backward(gate, types, grad, g, w, m, theta, dw, dm, begin, end);
    });
  }

  static void double_backward(Gate gate, ParamTypes types, Type grad, const void* a, const void* b, const void* g, const void* w,
                              const void* m, void* dg, void* dw, void* dm, int64_t n) {
    at::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
      masked_weight_kernels().double_backward(gate, types, grad, a, b, g, w, m, dg, dw, dm, begin, end);
    });
  }

  static void forward_list(Gate gate, ParamTypes types, Type out, const std::vector<ForwardArrays>& list) {
    share_list(list, [&](const ForwardArrays& of, int64_t begin, int64_t end) {
      masked_weight_kernels().forward(gate, types, out, of.w, of.m, of.theta, begin, end);
    });
  }

  static void backward_list(Gate gate, ParamTypes types, Type grad, const std::vector<BackwardArrays>& list) {
    share_list(list, [&](const BackwardArrays& of, int64_t begin, int64_t end) {
      masked_weight_kernels().backward(gate, types, grad, of.g, of.w, of.m, nullptr, Sink{of.dw}, Sink{of.dm}, begin, end);
    });
  }

  static void double_backward_list(Gate gate, ParamTypes types, Type grad, const std::vector<DoubleBackwardArrays>& list) {
    share_list(list, [&](const DoubleBackwardArrays& of, int64_t begin, int64_t end) {
      masked_weight_kernels().double_backward(gate, types, grad, of.a, of.b, of.g, of.w, of.m, of.dg, of.dw, of.dm, begin, end);
    });
  }

 private:
  // The threads share the elements of all arrays as if they were one: a list of small weights wakes them once.
  template <class Arrays, class Run>
  static void share_list(const std::vector<Arrays>& list, Run run) {
    int64_t all = 0;
    for (const Arrays& of : list) all += of.n;
    at::parallel_for(0, all, kGrain, [&](int64_t begin, int64_t end) {
      int64_t first = 0;
      for (const Arrays& of : list) {
        const int64_t from = std::max(begin - first, int64_t(0)), to = std::min(end - first, of.n);
        if (from < to) run(of, from, to);
        first += of.n;
      }
    });
  }
};

}  // namespace metamask::cpu
