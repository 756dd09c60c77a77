// masked_weight and its derivatives on the CPU: checks, memory, threads. The loops are in masked_weight_kernel.cpp.
#include "masked_weight_kernel.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "../checks.h"
#include "capability.h"

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

Type type_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return Type::kFloat64;
    case at::kBFloat16: return Type::kBFloat16;
    case at::kHalf: return Type::kFloat16;
    default: return Type::kFloat32;
  }
}

const void* data(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }

void* mutable_data(at::Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; }

at::Tensor masked_weight(const at::Tensor& weight, const at::Tensor& mask_logits, int64_t gate, double parameter,
                         std::optional<at::ScalarType> dtype) {
  check_gate(gate, parameter);
  check_pair(weight, mask_logits);
  const at::ScalarType out = dtype.value_or(weight.scalar_type());
  check_storage("dtype", out, weight);
  const at::Tensor w = dense(weight), m = laid_out_as(mask_logits, w);
  at::Tensor theta = at::empty_like(w, w.options().dtype(out));
  const Gate g{GateKind(gate), parameter};
  const Type param_type = type_of(w.scalar_type()), out_type = type_of(out);
  const void *w_data = data(w), *m_data = data(m);
  void* theta_data = mutable_data(theta);
  at::parallel_for(0, w.numel(), kGrain, [&](int64_t begin, int64_t end) {
    kernels().forward(g, param_type, out_type, w_data, m_data, theta_data, begin, end);
  });
  return theta;
}

std::tuple<at::Tensor, at::Tensor> masked_weight_backward(const at::Tensor& grad, const at::Tensor& weight,
                                                          const at::Tensor& mask_logits, int64_t gate, double parameter,
                                                          std::array<bool, 2> needs) {
  check_gate(gate, parameter);
  check_pair(weight, mask_logits);
  check_like("grad", grad, weight);
  const at::Tensor w = dense(weight), m = laid_out_as(mask_logits, w), g = laid_out_as(grad, w);
  at::Tensor dw = needs[0] ? at::empty_like(w) : at::Tensor();
  at::Tensor dm = needs[1] ? at::empty_like(w) : at::Tensor();
  const Gate gate_{GateKind(gate), parameter};
  const Type param_type = type_of(w.scalar_type()), grad_type = type_of(g.scalar_type());
  const void *g_data = data(g), *w_data = data(w), *m_data = data(m);
  void *dw_data = mutable_data(dw), *dm_data = mutable_data(dm);
  at::parallel_for(0, w.numel(), kGrain, [&](int64_t begin, int64_t end) {
    kernels().backward(gate_, param_type, grad_type, g_data, w_data, m_data, dw_data, dm_data, begin, end);
  });
  return {dw, dm};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> masked_weight_double_backward(
    const std::optional<at::Tensor>& cotangent_weight, const std::optional<at::Tensor>& cotangent_mask, const at::Tensor& grad,
    const at::Tensor& weight, const at::Tensor& mask_logits, int64_t gate, double parameter, std::array<bool, 3> needs) {
  check_gate(gate, parameter);
  check_pair(weight, mask_logits);
  check_like("grad", grad, weight);
  const at::Tensor w = dense(weight), m = laid_out_as(mask_logits, w), g = laid_out_as(grad, w);
  // Cotangents have the dtype of the parameters, whose gradients they answer.
  const auto cotangent = [&](const char* name, const std::optional<at::Tensor>& given) {
    if (!given.has_value() || !given->defined()) return at::Tensor();
    check_like(name, *given, weight);
    return laid_out_as(given->to(w.scalar_type()), w);
  };
  const at::Tensor a = cotangent("cotangent_weight", cotangent_weight), b = cotangent("cotangent_mask", cotangent_mask);
  at::Tensor dg = needs[0] ? at::empty_like(w, w.options().dtype(g.scalar_type())) : at::Tensor();
  at::Tensor dw = needs[1] ? at::empty_like(w) : at::Tensor();
  at::Tensor dm = needs[2] ? at::empty_like(w) : at::Tensor();
  const Gate gate_{GateKind(gate), parameter};
  const Type param_type = type_of(w.scalar_type()), grad_type = type_of(g.scalar_type());
  const void *a_data = data(a), *b_data = data(b), *g_data = data(g), *w_data = data(w), *m_data = data(m);
  void *dg_data = mutable_data(dg), *dw_data = mutable_data(dw), *dm_data = mutable_data(dm);
  at::parallel_for(0, w.numel(), kGrain, [&](int64_t begin, int64_t end) {
    kernels().double_backward(gate_, param_type, grad_type, a_data, b_data, g_data, w_data, m_data, dg_data, dw_data, dm_data, begin,
                              end);
  });
  return {dg, dw, dm};
}

}  // namespace

TORCH_LIBRARY_IMPL(metamask, CPU, m) {
  m.impl("masked_weight", &masked_weight);
  m.impl("masked_weight_backward", &masked_weight_backward);
  m.impl("masked_weight_double_backward", &masked_weight_double_backward);
}

}  // namespace metamask::cpu
