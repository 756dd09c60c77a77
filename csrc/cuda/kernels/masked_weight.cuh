// Elementwise kernels: every thread takes one pack of N neighbouring elements, with one load or store of at most 16 bytes for each
// array. The floor is bytes over bandwidth: 3 arrays forward, 5 backward, 8 double backward. A thread beyond the end loads zeros
// and stores nothing. A kernel takes one weight, or a list of them.
#pragma once

#include "cuda/kernels/vector_access.cuh"

namespace metamask::cuda {

template <int N>
DEVICE_INLINE int64_t first_element(unsigned block) {
  return (int64_t(block) * kThreads + threadIdx.x) * N;
}

// theta of the pack at i. w: [n] of P; m: [n] of M; theta: [n] of O
template <GateKind kind, int N, class P, class M, class O>
DEVICE_INLINE void forward_pack(Compute<P> gate_param, const P* w, const M* m, O* theta, int64_t i, int64_t n) {
  Compute<P> w_[N], m_[N], theta_[N];
  load<N>(w, i, n, w_);
  load<N>(m, i, n, m_);
  for (int k = 0; k < N; ++k) theta_[k] = theta_of<kind>(w_[k], m_[k], gate_param);
  store<N>(theta, i, n, theta_);
}

// g: [n] of O; w and what dw points to: [n] of P; m and what dm points to: [n] of M. A sink's parameter is w, or m: no other thread
// reads these elements.
template <GateKind kind, int N, class P, class M, class O>
DEVICE_INLINE void backward_pack(Compute<P> gate_param, const O* g, const P* w, const M* m, const Sink& dw, const Sink& dm,
                                 int64_t i, int64_t n) {
  Compute<P> g_[N], w_[N], m_[N], dw_[N], dm_[N];
  load<N>(g, i, n, g_);
  load<N>(w, i, n, w_);
  load<N>(m, i, n, m_);
  for (int k = 0; k < N; ++k) {
    const auto out = backward_of<kind>(g_[k], w_[k], m_[k], gate_param);
    dw_[k] = out.w;
    dm_[k] = out.m;
  }
  store_or_descend<N, P>(dw, i, n, w_, dw_);
  store_or_descend<N, M>(dm, i, n, m_, dm_);
}

// a, w, dw: [n] of P; b, m, dm: [n] of M; g, dg: [n] of O
template <GateKind kind, int N, class P, class M, class O>
DEVICE_INLINE void double_backward_pack(Compute<P> gate_param, const P* a, const M* b, const O* g, const P* w, const M* m, O* dg,
                                        P* dw, M* dm, int64_t i, int64_t n) {
  Compute<P> a_[N], b_[N], g_[N], w_[N], m_[N], dg_[N], dw_[N], dm_[N];
  load_or_zero<N>(a, i, n, a_);
  load_or_zero<N>(b, i, n, b_);
  load<N>(g, i, n, g_);
  load<N>(w, i, n, w_);
  load<N>(m, i, n, m_);
  for (int k = 0; k < N; ++k) {
    const auto out = double_backward_of<kind>(a_[k], b_[k], g_[k], w_[k], m_[k], gate_param);
    dg_[k] = out.g;
    dw_[k] = out.w;
    dm_[k] = out.m;
  }
  store<N>(dg, i, n, dg_);
  store<N>(dw, i, n, dw_);
  store<N>(dm, i, n, dm_);
}

template <GateKind kind, int N, class P, class M, class O>
__global__ void masked_weight_kernel(Compute<P> gate_param, const P* w, const M* m, O* theta, int64_t n) {
  forward_pack<kind, N>(gate_param, w, m, theta, first_element<N>(blockIdx.x), n);
}

template <GateKind kind, int N, class P, class M, class O>
__global__ void masked_weight_backward_kernel(Compute<P> gate_param, const O* g, const P* w, const M* m, Sink dw, Sink dm,
                                              int64_t n) {
  backward_pack<kind, N>(gate_param, g, w, m, dw, dm, first_element<N>(blockIdx.x), n);
}

template <GateKind kind, int N, class P, class M, class O>
__global__ void masked_weight_double_backward_kernel(Compute<P> gate_param, const P* a, const M* b, const O* g, const P* w,
                                                     const M* m, O* dg, P* dw, M* dm, int64_t n) {
  double_backward_pack<kind, N>(gate_param, a, b, g, w, m, dg, dw, dm, first_element<N>(blockIdx.x), n);
}

// Some of a list, as a kernel's argument: a table in memory would have to be copied there before each launch, and a CUDA graph
// would repeat that copy from memory of the host that is gone.
template <class Arrays>
struct ListPart {
  // The weights that fit into the 4 KiB that arguments may take on every device, beside the gate's parameter.
  static constexpr int kRoom = 4000 / int(sizeof(Arrays) + sizeof(unsigned));

  Arrays at[kRoom];
  unsigned end[kRoom];  // the first block behind those of at[i]
  int count;
};

// Returns which weight this block works on; i becomes the first of this thread's elements.
template <int N, class Arrays>
DEVICE_INLINE int find_weight(const ListPart<Arrays>& part, int64_t& i) {
  int low = 0;
  for (int high = part.count - 1; low < high;) {
    const int middle = (low + high) / 2;
    if (blockIdx.x < part.end[middle]) high = middle;
    else low = middle + 1;
  }
  i = first_element<N>(low == 0 ? blockIdx.x : blockIdx.x - part.end[low - 1]);
  return low;
}

template <GateKind kind, int N, class P, class M, class O>
__global__ void masked_weight_list_kernel(Compute<P> gate_param, const __grid_constant__ ListPart<ForwardArrays> part) {
  int64_t i;
  const ForwardArrays& of = part.at[find_weight<N>(part, i)];
  forward_pack<kind, N>(gate_param, static_cast<const P*>(of.w), static_cast<const M*>(of.m), static_cast<O*>(of.theta), i, of.n);
}

template <GateKind kind, int N, class P, class M, class O>
__global__ void masked_weight_list_backward_kernel(Compute<P> gate_param, const __grid_constant__ ListPart<BackwardArrays> part) {
  int64_t i;
  const BackwardArrays& of = part.at[find_weight<N>(part, i)];
  backward_pack<kind, N>(gate_param, static_cast<const O*>(of.g), static_cast<const P*>(of.w), static_cast<const M*>(of.m),
                         Sink{of.dw}, Sink{of.dm}, i, of.n);
}

template <GateKind kind, int N, class P, class M, class O>
__global__ void masked_weight_list_double_backward_kernel(Compute<P> gate_param,
                                                          const __grid_constant__ ListPart<DoubleBackwardArrays> part) {
  int64_t i;
  const DoubleBackwardArrays& of = part.at[find_weight<N>(part, i)];
  double_backward_pack<kind, N>(gate_param, static_cast<const P*>(of.a), static_cast<const M*>(of.b), static_cast<const O*>(of.g),
                                static_cast<const P*>(of.w), static_cast<const M*>(of.m), static_cast<O*>(of.dg),
                                static_cast<P*>(of.dw), static_cast<M*>(of.dm), i, of.n);
}

}  // namespace metamask::cuda
