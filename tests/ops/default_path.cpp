// The default instruction set's loops without torch, for a processor that has no more: prints their largest errors.
#include <cmath>
#include <cstdio>
#include <vector>

#include "cpu/kernels/masked_weight.h"
#include "cpu/kernels/gemm.h"

using namespace metamask;
using namespace metamask::cpu;

namespace {

double worst = 0;

void compare(double got, double expected, double scale) {
  const double error = std::fabs(got - expected) / (scale + 1e-36);
  worst = error <= worst ? worst : error;  // a NaN error stays
}

void masked_weight() {
  const int64_t n = 1134;
  std::vector<float> w(n), m(n), g(n), theta(n), dw(n), dm(n), momentum_buffer(n, 0.5f);
  for (int64_t i = 0; i < n; ++i) {
    w[i] = float(i % 7) - 3.0f;
    m[i] = float(i % 41) - 20.0f;
    g[i] = float(i % 5) - 2.0f;
  }
  const Gate gate{kSigmoid, 0.5};
  const auto& kernels = kMaskedWeight_default;
  const ParamTypes types{Type::kFloat32, Type::kFloat32};
  kernels.forward(gate, types, Type::kFloat32, w.data(), m.data(), theta.data(), 0, n);
  kernels.backward(gate, types, Type::kFloat32, g.data(), w.data(), m.data(), nullptr, Sink{dw.data()}, Sink{dm.data()}, 0, n);
  std::vector<float> w_after = w, m_after = m;
  kernels.backward(gate, types, Type::kFloat32, g.data(), w_after.data(), m_after.data(), nullptr,
                   Sink{nullptr, w_after.data(), momentum_buffer.data(), {0.1, 0.01, 0.9}},
                   Sink{nullptr, m_after.data(), nullptr, {0.2, 0.02, 0.0}}, 0, n);
  std::vector<float> w_moved = w, mean(n, 0.25f), square(n, 0.5f);
  Sink adamw{nullptr, w_moved.data()};
  adamw.exp_avg = mean.data();
  adamw.exp_avg_sq = square.data();
  adamw.adamw = {0.99, 0.9, 0.75, 0.2, 1.5, 0.1};
  kernels.backward(gate, types, Type::kFloat32, g.data(), w_moved.data(), m.data(), nullptr, adamw, Sink{}, 0, n);
  // The same weights in 16 bits, beside the same logits.
  std::vector<BFloat16> w_bits(n);
  std::vector<float> theta_of_bits(n), dm_of_bits(n);
  for (int64_t i = 0; i < n; ++i) narrow(w[i], w_bits[i]);
  const ParamTypes mixed{Type::kBFloat16, Type::kFloat32};
  kernels.forward(gate, mixed, Type::kFloat32, w_bits.data(), m.data(), theta_of_bits.data(), 0, n);
  kernels.backward(gate, mixed, Type::kFloat32, g.data(), w_bits.data(), m.data(), nullptr, Sink{}, Sink{dm_of_bits.data()}, 0, n);
  for (int64_t i = 0; i < n; ++i) {
    const double s = 1 / (1 + std::exp(-2.0 * m[i])), rest = 1 / (1 + std::exp(2.0 * m[i]));
    const double exact_dw = g[i] * s, exact_dm = g[i] * w[i] * s * rest * 2;
    compare(theta[i], w[i] * s, std::fabs(w[i] * s));
    compare(dw[i], exact_dw, std::fabs(exact_dw));
    compare(dm[i], exact_dm, std::fabs(exact_dm));
    compare(theta_of_bits[i], theta[i], 0);
    compare(dm_of_bits[i], dm[i], 0);
    compare(w_after[i], w[i] - 0.1 * (0.9 * 0.5 + exact_dw + 0.01 * w[i]), 1 + std::fabs(w[i]));
    compare(m_after[i], m[i] - 0.2 * (exact_dm + 0.02 * m[i]), 1 + std::fabs(m[i]));
    const double exact_mean = 0.9 * 0.25 + 0.1 * exact_dw, exact_square = 0.75 * 0.5 + 0.25 * exact_dw * exact_dw;
    compare(mean[i], exact_mean, 1);
    compare(square[i], exact_square, 1);
    compare(w_moved[i], 0.99 * w[i] - 0.2 * exact_mean / (1.5 * std::sqrt(exact_square) + 0.1), 1 + std::fabs(w[i]));
  }
}

template <class T>
void products(const GemmKernels<T>& kernels) {
  const int64_t rows = 7, columns = 5, row = 96, length = 80;  // rows are longer than what is multiplied
  std::vector<T> a(rows * row), b(columns * row), y(rows * columns, T(1)), z(columns * row, T(1));
  for (size_t i = 0; i < a.size(); ++i) a[i] = T(int(i % 13) - 6) / 7;
  for (size_t i = 0; i < b.size(); ++i) b[i] = T(int(i % 11) - 5) / 3;
  kernels.gemm_nt(a.data(), row, b.data(), row, y.data(), columns, rows, columns, length);
  // z[j] += sum over i of y[i, j] a[i]: the first factor is read by columns
  kernels.gemm_nn(y.data(), 1, columns, a.data(), row, z.data(), row, columns, rows, length, true);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 1;
      for (int64_t k = 0; k < length; ++k) sum += double(a[i * row + k]) * double(b[j * row + k]);
      compare(y[i * columns + j], sum, double(length));
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t k = 0; k < row; ++k) {
      double sum = 1;
      for (int64_t i = 0; i < rows && k < length; ++i) sum += double(y[i * columns + j]) * double(a[i * row + k]);
      compare(z[j * row + k], sum, double(length));
    }
  }
}

}  // namespace

int main() {
  masked_weight();
  products(kGemm_default.float32);
  products(kGemm_default.float64);
  std::printf("%g\n", worst);
  return worst <= 1e-6 ? 0 : 1;
}
