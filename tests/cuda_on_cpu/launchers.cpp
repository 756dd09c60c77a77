// The CUDA launchers with C names, for ctypes: the project's own .cu, compiled as C++.
#include "../../csrc/cuda/masked_weight.cu"

using namespace metamask;

extern "C" {

void run_forward(int64_t gate, double parameter, int param, int out, const void* w, const void* m, void* theta, int64_t n) {
  cuda::masked_weight({GateKind(gate), parameter}, Type(param), Type(out), w, m, theta, n, nullptr);
}

void run_backward(int64_t gate, double parameter, int param, int grad, const void* g, const void* w, const void* m, void* dw,
                  void* dm, int64_t n) {
  cuda::masked_weight_backward({GateKind(gate), parameter}, Type(param), Type(grad), g, w, m, Sink{dw}, Sink{dm}, n, nullptr);
}

void run_backward_sgd(int64_t gate, double parameter, int param, int grad, const void* g, void* w, void* m, void* w_velocity,
                      void* m_velocity, int64_t n) {
  const Sgd w_sgd{0.1, 0.01, w_velocity == nullptr ? 0.0 : 0.9}, m_sgd{0.2, 0.02, m_velocity == nullptr ? 0.0 : 0.8};
  cuda::masked_weight_backward({GateKind(gate), parameter}, Type(param), Type(grad), g, w, m, Sink{nullptr, w, w_velocity, w_sgd},
                               Sink{nullptr, m, m_velocity, m_sgd}, n, nullptr);
}

void run_double_backward(int64_t gate, double parameter, int param, int grad, const void* a, const void* b, const void* g,
                         const void* w, const void* m, void* dg, void* dw, void* dm, int64_t n) {
  cuda::masked_weight_double_backward({GateKind(gate), parameter}, Type(param), Type(grad), a, b, g, w, m, dg, dw, dm, n, nullptr);
}
}
