// The default instruction set's loops without torch, for a processor that has no more: prints what they compute.
#include <cmath>
#include <cstdio>
#include <vector>

#include "../csrc/cpu/masked_weight_kernel.h"

using namespace metamask;
using namespace metamask::cpu;

int main() {
  const int64_t n = 1134;
  std::vector<float> w(n), m(n), g(n), theta(n), dw(n), dm(n);
  for (int64_t i = 0; i < n; ++i) {
    w[i] = float(i % 7) - 3.0f;
    m[i] = float(i % 41) - 20.0f;
    g[i] = float(i % 5) - 2.0f;
  }
  const Gate gate{kSigmoid, 0.5};
  kMaskedWeight_default.forward(gate, Type::kFloat32, Type::kFloat32, w.data(), m.data(), theta.data(), 0, n);
  kMaskedWeight_default.backward(gate, Type::kFloat32, Type::kFloat32, g.data(), w.data(), m.data(), nullptr, dw.data(), dm.data(),
                                 0, n);
  double worst = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double s = 1 / (1 + std::exp(-2.0 * m[i])), rest = 1 / (1 + std::exp(2.0 * m[i]));
    const double expected[] = {w[i] * s, g[i] * s, g[i] * w[i] * s * rest * 2};
    const double got[] = {theta[i], dw[i], dm[i]};
    for (int k = 0; k < 3; ++k) {
      const double error = std::fabs(got[k] - expected[k]) / (std::fabs(expected[k]) + 1e-36);
      worst = error <= worst ? worst : error;  // a NaN error stays
    }
  }
  std::printf("%g\n", worst);
  return worst <= 1e-6 ? 0 : 1;
}
