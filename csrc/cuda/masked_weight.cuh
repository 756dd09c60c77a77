// Elementwise kernels: every thread takes one pack of N neighbouring elements, with one load or store of at most 16 bytes for each
// array. The floor is bytes over bandwidth: 3 arrays forward, 5 backward, 8 double backward. A thread beyond the end loads zeros
// and stores nothing.
#pragma once

#include "memory.cuh"

namespace metamask::cuda {

template <int N>
DEVICE_INLINE int64_t first_element() {
  return (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N;
}

// w, m: [n] of P; theta: [n] of O
template <GateKind kind, int N, class P, class O>
__global__ void masked_weight_kernel(Compute<P> parameter, const P* w, const P* m, O* theta, int64_t n) {
  const int64_t i = first_element<N>();
  Compute<P> w_[N], m_[N], theta_[N];
  load<N>(w, i, n, w_);
  load<N>(m, i, n, m_);
  for (int k = 0; k < N; ++k) theta_[k] = theta_of<kind>(w_[k], m_[k], parameter);
  store<N>(theta, i, n, theta_);
}

// g: [n] of O; w, m and what the sinks point to: [n] of P. A sink's parameter is w, or m: no other thread reads these elements.
template <GateKind kind, int N, class P, class O>
__global__ void masked_weight_backward_kernel(Compute<P> parameter, const O* g, const P* w, const P* m, Sink dw, Sink dm,
                                              int64_t n) {
  const int64_t i = first_element<N>();
  Compute<P> g_[N], w_[N], m_[N], dw_[N], dm_[N];
  load<N>(g, i, n, g_);
  load<N>(w, i, n, w_);
  load<N>(m, i, n, m_);
  for (int k = 0; k < N; ++k) {
    const auto out = backward_of<kind>(g_[k], w_[k], m_[k], parameter);
    dw_[k] = out.w;
    dm_[k] = out.m;
  }
  store_or_descend<N, P>(dw, i, n, w_, dw_);
  store_or_descend<N, P>(dm, i, n, m_, dm_);
}

// a, b, w, m, dw, dm: [n] of P; g, dg: [n] of O
template <GateKind kind, int N, class P, class O>
__global__ void masked_weight_double_backward_kernel(Compute<P> parameter, const P* a, const P* b, const O* g, const P* w,
                                                     const P* m, O* dg, P* dw, P* dm, int64_t n) {
  const int64_t i = first_element<N>();
  Compute<P> a_[N], b_[N], g_[N], w_[N], m_[N], dg_[N], dw_[N], dm_[N];
  load_or_zero<N>(a, i, n, a_);
  load_or_zero<N>(b, i, n, b_);
  load<N>(g, i, n, g_);
  load<N>(w, i, n, w_);
  load<N>(m, i, n, m_);
  for (int k = 0; k < N; ++k) {
    const auto out = double_backward_of<kind>(a_[k], b_[k], g_[k], w_[k], m_[k], parameter);
    dg_[k] = out.g;
    dw_[k] = out.w;
    dm_[k] = out.m;
  }
  store<N>(dg, i, n, dg_);
  store<N>(dw, i, n, dw_);
  store<N>(dm, i, n, dm_);
}

}  // namespace metamask::cuda
