// Launchers of masked_weight: they choose one kernel from types and pointers known at run time.
#include "cuda/kernels/masked_weight.h"

#include <algorithm>

#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/masked_weight.cuh"

namespace metamask::cuda {
namespace {

dim3 blocks_for(int64_t n, int per_thread) {
  const int64_t per_block = int64_t(kThreads) * per_thread;
  return grid_of(ceil_div(n, per_block));
}

// Calls run.operator()<kind, N, P, M, O>() for weights and logits of `types` and the other arrays of type `other`; N is 1 where an
// array is not aligned for packs (a view with an offset).
template <GateKind kind, class P, class M, class O, class Run>
void with_pack(bool packs, Run run) {
  constexpr int kPack = kPackBytes / int(std::max({sizeof(P), sizeof(M), sizeof(O)}));
  if (packs) run.template operator()<kind, kPack, P, M, O>();
  else run.template operator()<kind, 1, P, M, O>();
}

template <GateKind kind, class P, class M, class Run>
void with_other(Type other, bool packs, Run run) {
  switch (other) {
    case Type::kBFloat16: return with_pack<kind, P, M, __nv_bfloat16>(packs, run);
    case Type::kFloat16: return with_pack<kind, P, M, __half>(packs, run);
    default: return with_pack<kind, P, M, float>(packs, run);
  }
}

template <GateKind kind, class P, class Run>
void with_mask(Type mask, Type other, bool packs, Run run) {
  if (mask == Type::kFloat32) with_other<kind, P, float>(other, packs, run);
  else with_other<kind, P, P>(other, packs, run);
}

template <GateKind kind, class Run>
void with_types(ParamTypes types, Type other, bool packs, Run run) {
  switch (types.weight) {
    case Type::kFloat64: return with_pack<kind, double, double, double>(packs, run);
    case Type::kBFloat16: return with_mask<kind, __nv_bfloat16>(types.mask, other, packs, run);
    case Type::kFloat16: return with_mask<kind, __half>(types.mask, other, packs, run);
    default: return with_other<kind, float, float>(other, packs, run);
  }
}

template <class Run>
void dispatch(Gate gate, ParamTypes types, Type other, bool packs, Run run) {
  if (gate.kind == kSigmoid) with_types<kSigmoid>(types, other, packs, run);
  else with_types<kHard>(types, other, packs, run);
}

bool all_aligned(const ForwardArrays& of) { return aligned(of.w, of.m, of.theta); }
bool all_aligned(const BackwardArrays& of) { return aligned(of.g, of.w, of.m, of.dw, of.dm); }
bool all_aligned(const DoubleBackwardArrays& of) { return aligned(of.a, of.b, of.g, of.w, of.m, of.dg, of.dw, of.dm); }

// Dispatches once for each part of the list: calls run.operator()<kind, N, P, M, O>(part, blocks). If one array of the list is not
// aligned for packs, none uses them.
template <class Arrays, class Run>
void dispatch_list(Gate gate, ParamTypes types, Type other, const std::vector<Arrays>& list, Run run) {
  bool packs = true;
  for (const Arrays& of : list) packs = packs && all_aligned(of);
  dispatch(gate, types, other, packs, [&]<GateKind kind, int N, class P, class M, class O>() {
    ListPart<Arrays> part{};
    int64_t blocks = 0;
    const auto finish = [&] {
      if (part.count > 0) run.template operator()<kind, N, P, M, O>(part, grid_of(blocks));
      part.count = 0;
      blocks = 0;
    };
    for (const Arrays& of : list) {
      if (of.n == 0) continue;
      blocks += blocks_for(of.n, N).x;
      part.at[part.count] = of;
      part.end[part.count++] = unsigned(blocks);
      if (part.count == ListPart<Arrays>::kRoom) finish();
    }
    finish();
  });
}

}  // namespace

void masked_weight(Gate gate, ParamTypes types, Type other, const void* w, const void* m, void* theta, int64_t n,
                   cudaStream_t stream) {
  if (n == 0) return;
  dispatch(gate, types, other, aligned(w, m, theta), [&]<GateKind kind, int N, class P, class M, class O>() {
    launch(masked_weight_kernel<kind, N, P, M, O>, blocks_for(n, N), dim3(kThreads), 0, stream, gate_param_of<Compute<P>>(gate),
           in<P>(w), in<M>(m), out<O>(theta), n);
  });
}

void masked_weight_backward(Gate gate, ParamTypes types, Type other, const void* g, const void* w, const void* m, Sink dw, Sink dm,
                            int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  const bool packs = aligned(g, w, m, dw.gradient, dw.parameter, dw.momentum_buffer, dm.gradient, dm.parameter, dm.momentum_buffer);
  dispatch(gate, types, other, packs, [&]<GateKind kind, int N, class P, class M, class O>() {
    launch(masked_weight_backward_kernel<kind, N, P, M, O>, blocks_for(n, N), dim3(kThreads), 0, stream,
           gate_param_of<Compute<P>>(gate), in<O>(g), in<P>(w), in<M>(m), dw, dm, n);
  });
}

void masked_weight_double_backward(Gate gate, ParamTypes types, Type other, const void* a, const void* b, const void* g,
                                   const void* w, const void* m, void* dg, void* dw, void* dm, int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  dispatch(gate, types, other, aligned(a, b, g, w, m, dg, dw, dm), [&]<GateKind kind, int N, class P, class M, class O>() {
    launch(masked_weight_double_backward_kernel<kind, N, P, M, O>, blocks_for(n, N), dim3(kThreads), 0, stream,
           gate_param_of<Compute<P>>(gate), in<P>(a), in<M>(b), in<O>(g), in<P>(w), in<M>(m), out<O>(dg), out<P>(dw), out<M>(dm),
           n);
  });
}

void masked_weight_list(Gate gate, ParamTypes types, Type other, const std::vector<ForwardArrays>& list, cudaStream_t stream) {
  dispatch_list(gate, types, other, list, [&]<GateKind kind, int N, class P, class M, class O>(const auto& part, dim3 blocks) {
    launch(masked_weight_list_kernel<kind, N, P, M, O>, blocks, dim3(kThreads), 0, stream, gate_param_of<Compute<P>>(gate), part);
  });
}

void masked_weight_list_backward(Gate gate, ParamTypes types, Type other, const std::vector<BackwardArrays>& list,
                                 cudaStream_t stream) {
  dispatch_list(gate, types, other, list, [&]<GateKind kind, int N, class P, class M, class O>(const auto& part, dim3 blocks) {
    launch(masked_weight_list_backward_kernel<kind, N, P, M, O>, blocks, dim3(kThreads), 0, stream, gate_param_of<Compute<P>>(gate),
           part);
  });
}

void masked_weight_list_double_backward(Gate gate, ParamTypes types, Type other, const std::vector<DoubleBackwardArrays>& list,
                                        cudaStream_t stream) {
  dispatch_list(gate, types, other, list, [&]<GateKind kind, int N, class P, class M, class O>(const auto& part, dim3 blocks) {
    launch(masked_weight_list_double_backward_kernel<kind, N, P, M, O>, blocks, dim3(kThreads), 0, stream,
           gate_param_of<Compute<P>>(gate), part);
  });
}

}  // namespace metamask::cuda
