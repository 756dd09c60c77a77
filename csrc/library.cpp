// Every schema of the library, the guard against differentiating a raw op by accident, and the Python module _C.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <array>
#include <type_traits>
#include <utility>

#include "cpu/capability.h"
#include "cpu/panels.h"
#include "cpu/products.h"

TORCH_LIBRARY(metamask, m) {
  // gate_id: 0 sigmoid, 1 hard (core/gate.h). gate_param: the sigmoid's temperature, or the hard gate's threshold. output_mask
  // chooses the gradients to compute, as in ATen.
  m.def("masked_weight(Tensor weight, Tensor mask_logits, int gate_id, float gate_param, ScalarType? dtype=None) -> Tensor");
  m.def(
      "masked_weight_backward(Tensor grad, Tensor weight, Tensor mask_logits, int gate_id, float gate_param, "
      "bool[2] output_mask=True) -> (Tensor, Tensor)");
  // Updates in place each parameter with updates[i]. The settings are lr, weight_decay and momentum.
  m.def(
      "masked_weight_backward_sgd_(Tensor grad, Tensor(a!) weight, Tensor(b!) mask_logits, Tensor(c!)? weight_momentum_buffer, "
      "Tensor(d!)? mask_momentum_buffer, int gate_id, float gate_param, bool[2] output_mask, bool[2] updates, "
      "float[] weight_settings, float[] mask_settings) -> (Tensor, Tensor)");
  // The state is exp_avg, exp_avg_sq and step of each parameter with updates[i], the settings lr, beta1, beta2, eps and
  // weight_decay of each parameter. CPU only.
  m.def(
      "masked_weight_backward_adamw_(Tensor grad, Tensor(a!) weight, Tensor(b!) mask_logits, Tensor(c!)[] state, int gate_id, "
      "float gate_param, bool[2] output_mask, bool[2] updates, float[] settings) -> (Tensor, Tensor)");
  m.def(
      "masked_weight_double_backward(Tensor? cotangent_weight, Tensor? cotangent_mask, Tensor grad, Tensor weight, "
      "Tensor mask_logits, int gate_id, float gate_param, bool[3] output_mask=True) -> (Tensor, Tensor, Tensor)");
  // The same for a list of weights. An output that output_mask leaves out is an empty list; an empty list of cotangents is zero.
  m.def(
      "masked_weight_list(Tensor[] weight, Tensor[] mask_logits, int gate_id, float gate_param, ScalarType? dtype=None) -> "
      "Tensor[]");
  m.def(
      "masked_weight_list_backward(Tensor[] grad, Tensor[] weight, Tensor[] mask_logits, int gate_id, float gate_param, "
      "bool[2] output_mask=True) -> (Tensor[], Tensor[])");
  m.def(
      "masked_weight_list_double_backward(Tensor?[] cotangent_weight, Tensor?[] cotangent_mask, Tensor[] grad, Tensor[] weight, "
      "Tensor[] mask_logits, int gate_id, float gate_param, bool[3] output_mask=True) -> (Tensor[], Tensor[], Tensor[])");
  m.def(
      "masked_linear(Tensor input, Tensor weight, Tensor mask_logits, Tensor? bias, Tensor? bias_mask_logits, int gate_id, "
      "float gate_param, ScalarType? dtype=None) -> Tensor");
  m.def(
      "masked_linear_backward(Tensor grad, Tensor input, Tensor weight, Tensor mask_logits, Tensor? bias, "
      "Tensor? bias_mask_logits, int gate_id, float gate_param, bool[5] output_mask=True) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "masked_linear_backward_sgd_(Tensor grad, Tensor input, Tensor(a!) weight, Tensor(b!) mask_logits, Tensor(c!)? bias, "
      "Tensor(d!)? bias_mask_logits, Tensor(e!)? weight_momentum_buffer, Tensor(f!)? mask_momentum_buffer, "
      "Tensor(g!)? bias_momentum_buffer, Tensor(h!)? bias_mask_momentum_buffer, int gate_id, float gate_param, "
      "bool[5] output_mask, bool[4] updates, float[] settings) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "masked_linear_backward_adamw_(Tensor grad, Tensor input, Tensor(a!) weight, Tensor(b!) mask_logits, Tensor(c!)? bias, "
      "Tensor(d!)? bias_mask_logits, Tensor(e!)[] state, int gate_id, float gate_param, bool[5] output_mask, bool[4] updates, "
      "float[] settings) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // im2col: images [N, C, H, W] to rows [N, places, C * kH * kW], one for each place of a convolution's output. col2im: the
  // gradient of the images, where rows overlap and add up. CPU only.
  m.def("im2col(Tensor input, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation) -> Tensor");
  m.def("col2im(Tensor grad, SymInt[4] size, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation) -> Tensor");

  // `masks` is one tensor [T, out, in] or T tensors [out, in], `bias_masks` likewise or empty; gradients come in the same form.
  m.def(
      "task_masked_linear(Tensor input, Tensor slots, Tensor weight, Tensor[] masks, Tensor? bias, Tensor[] bias_masks, "
      "int gate_id, float gate_param, int groups=1, ScalarType? dtype=None) -> Tensor");
  m.def(
      "task_masked_linear_backward(Tensor grad, Tensor input, Tensor slots, Tensor weight, Tensor[] masks, Tensor? bias, "
      "Tensor[] bias_masks, int gate_id, float gate_param, int groups=1, bool[5] output_mask=True) -> "
      "(Tensor, Tensor, Tensor[], Tensor, Tensor[])");
  m.def(
      "task_masked_linear_double_backward(Tensor? cotangent_input, Tensor? cotangent_weight, Tensor?[] cotangent_masks, "
      "Tensor? cotangent_bias, Tensor?[] cotangent_bias_masks, Tensor grad, Tensor input, Tensor slots, Tensor weight, "
      "Tensor[] masks, Tensor? bias, Tensor[] bias_masks, int gate_id, float gate_param, int groups=1, "
      "bool[6] output_mask=True) -> (Tensor, Tensor, Tensor, Tensor[], Tensor, Tensor[])");
  // Masks of one bit a weight. `packed` is one tensor with a dimension of tasks in front, or a list of one tensor a task.
  m.def("pack_mask(Tensor mask_logits, float threshold) -> Tensor");
  m.def("unpack_mask(Tensor packed, int[] shape) -> Tensor");
  m.def(
      "packed_masked_linear(Tensor input, Tensor slots, Tensor weight, Tensor[] packed, Tensor? bias, Tensor[]? packed_bias, "
      "int groups, ScalarType? dtype=None) -> Tensor");
  m.def(
      "packed_masked_linear_backward(Tensor grad, Tensor input, Tensor slots, Tensor weight, Tensor[] packed, Tensor? bias, "
      "Tensor[]? packed_bias, int groups, bool[3] output_mask=True) -> (Tensor, Tensor, Tensor)");
  m.def("packed_superposition_gradient(Tensor grad, Tensor input, Tensor weight, Tensor[] packed, int groups) -> Tensor");
}

namespace metamask {
namespace {

void refuse_if_differentiated(const c10::OperatorHandle& op, const at::Tensor& tensor) {
  if (!tensor.defined()) return;
  TORCH_CHECK(!(at::GradMode::is_enabled() && tensor.requires_grad()) && !tensor._fw_grad(0).defined(), op.schema().name(),
              " has no derivative: call the functions of metamask_ext, or detach its inputs");
}

// Runs where autograd would record the op: passes on what nobody differentiates, refuses the rest. Without it the result would
// silently be a constant.
void undifferentiable(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  for (const c10::IValue& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) refuse_if_differentiated(op, value.toTensor());
    if (value.isList()) {
      for (const c10::IValue& element : value.toListRef()) {
        if (element.isTensor()) refuse_if_differentiated(op, element.toTensor());
      }
    }
  }
  at::AutoDispatchBelowADInplaceOrView below;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

#if !defined(METAMASK_CUDA)
void without_cuda(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK(false, op.schema().name(),
              ": this build of metamask_ext has no CUDA kernels. Install it again where torch "
              "has CUDA and a CUDA toolkit (nvcc) is found, or move the tensors to the CPU");
}
#endif

constexpr const char* kOps[] = {"masked_weight",
                                "masked_weight_backward",
                                "masked_weight_backward_sgd_",
                                "masked_weight_double_backward",
                                "masked_linear",
                                "masked_linear_backward",
                                "masked_linear_backward_sgd_",
                                "pack_mask",
                                "unpack_mask",
                                "packed_masked_linear",
                                "packed_masked_linear_backward",
                                "packed_superposition_gradient",
                                "task_masked_linear",
                                "task_masked_linear_backward",
                                "task_masked_linear_double_backward",
                                "masked_weight_list",
                                "masked_weight_list_backward",
                                "masked_weight_list_double_backward"};
constexpr const char* kCpuOps[] = {"im2col", "col2im", "masked_weight_backward_adamw_", "masked_linear_backward_adamw_"};

TORCH_LIBRARY_IMPL(metamask, Autograd, m) {
  for (const char* op : kOps) m.impl(op, torch::CppFunction::makeFromBoxedFunction<&undifferentiable>());
  for (const char* op : kCpuOps) m.impl(op, torch::CppFunction::makeFromBoxedFunction<&undifferentiable>());
}

// Of an op that updates arguments torch resolves none: these ops resolve what they read, and refuse to update a lazy view.
constexpr const char* kUpdatingOps[] = {"masked_weight_backward_sgd_", "masked_linear_backward_sgd_",
                                        "masked_weight_backward_adamw_", "masked_linear_backward_adamw_"};

TORCH_LIBRARY_IMPL(metamask, Negative, m) {
  for (const char* op : kUpdatingOps) m.impl(op, torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(metamask, ZeroTensor, m) {
  for (const char* op : kUpdatingOps) m.impl(op, torch::CppFunction::makeFallthrough());
}

#if !defined(METAMASK_CUDA)
TORCH_LIBRARY_IMPL(metamask, CUDA, m) {
  for (const char* op : kOps) m.impl(op, torch::CppFunction::makeFromBoxedFunction<&without_cuda>());
}
#endif

using OptionalTensor = std::optional<at::Tensor>;
using Tensors = std::vector<at::Tensor>;

// Calls the op of this name without torch.ops, which compares the arguments with the schema and boxes them, twice: in a small layer
// that takes as long as the kernel. `undifferentiable` is not passed through: what it refuses is refused here.
template <class Result, class... Arguments>
Result call_directly(const c10::TypedOperatorHandle<Result(Arguments...)>& op, std::type_identity_t<Arguments>... arguments) {
  const auto check = [&](const auto& argument) {
    using Argument = std::decay_t<decltype(argument)>;
    if constexpr (std::is_same_v<Argument, at::Tensor>) refuse_if_differentiated(op, argument);
    if constexpr (std::is_same_v<Argument, OptionalTensor>) {
      if (argument.has_value()) refuse_if_differentiated(op, *argument);
    }
  };
  (check(arguments), ...);
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(std::forward<Arguments>(arguments)...);
}

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

at::Tensor masked_linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask_logits,
                         const OptionalTensor& bias, const OptionalTensor& bias_mask_logits, int64_t gate_id, double gate_param,
                         std::optional<at::ScalarType> dtype) {
  static const auto op =
      find<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                      int64_t, double, std::optional<at::ScalarType>)>("metamask::masked_linear");
  return call_directly(op, input, weight, mask_logits, bias, bias_mask_logits, gate_id, gate_param, dtype);
}

Gradients masked_linear_backward(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
                                 const at::Tensor& mask_logits, const OptionalTensor& bias, const OptionalTensor& bias_mask_logits,
                                 int64_t gate_id, double gate_param, std::array<bool, 5> output_mask) {
  static const auto op =
      find<Gradients(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                     const OptionalTensor&, int64_t, double, std::array<bool, 5>)>("metamask::masked_linear_backward");
  return call_directly(op, grad, input, weight, mask_logits, bias, bias_mask_logits, gate_id, gate_param, output_mask);
}

Gradients masked_linear_backward_sgd_(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
                                      const at::Tensor& mask_logits, const OptionalTensor& bias,
                                      const OptionalTensor& bias_mask_logits, const OptionalTensor& weight_momentum,
                                      const OptionalTensor& mask_momentum, const OptionalTensor& bias_momentum,
                                      const OptionalTensor& bias_mask_momentum, int64_t gate_id, double gate_param,
                                      std::array<bool, 5> output_mask, std::array<bool, 4> updates,
                                      const std::vector<double>& settings) {
  static const auto op =
      find<Gradients(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                     const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                     const OptionalTensor&, int64_t, double, std::array<bool, 5>, std::array<bool, 4>, at::ArrayRef<double>)>(
          "metamask::masked_linear_backward_sgd_");
  return call_directly(op, grad, input, weight, mask_logits, bias, bias_mask_logits, weight_momentum, mask_momentum, bias_momentum,
                       bias_mask_momentum, gate_id, gate_param, output_mask, updates, at::ArrayRef<double>(settings));
}

at::Tensor packed_masked_linear(const at::Tensor& input, const at::Tensor& slots, const at::Tensor& weight, const Tensors& packed,
                                const OptionalTensor& bias, const std::optional<Tensors>& packed_bias, int64_t groups,
                                std::optional<at::ScalarType> dtype) {
  static const auto op =
      find<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, at::TensorList, const OptionalTensor&,
                      const std::optional<Tensors>&, int64_t, std::optional<at::ScalarType>)>("metamask::packed_masked_linear");
  return call_directly(op, input, slots, weight, at::TensorList(packed), bias, packed_bias, groups, dtype);
}

// Also where Python does not know of a level of forward-mode AD: a graph of torch.compile enters one without its count.
bool has_tangent(const at::Tensor& tensor) { return tensor.defined() && tensor._fw_grad(0).defined(); }

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["cpu_capability"] = cpu::name_of(cpu::capability());
  info["cpu_capabilities"] = cpu::available_capabilities();
#if defined(_OPENMP)
  info["threads"] = "openmp";
#else
  info["threads"] = "none";
#endif
#if defined(METAMASK_CUDA)
  info["cuda_archs"] = METAMASK_CUDA_ARCHS;
#else
  info["cuda_archs"] = pybind11::none();
#endif
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  return info;
}

}  // namespace
}  // namespace metamask

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers torch.ops.metamask when it is loaded.";
  using pybind11::arg;
  // The ops of torch.ops.metamask with these names, called directly.
  const auto none = pybind11::none();
  m.def("masked_linear", torch::wrap_pybind_function_no_gil(&metamask::masked_linear), arg("input"), arg("weight"),
        arg("mask_logits"), arg("bias"), arg("bias_mask_logits"), arg("gate_id"), arg("gate_param"), arg("dtype") = none);
  m.def("masked_linear_backward", torch::wrap_pybind_function_no_gil(&metamask::masked_linear_backward), arg("grad"), arg("input"),
        arg("weight"), arg("mask_logits"), arg("bias"), arg("bias_mask_logits"), arg("gate_id"), arg("gate_param"),
        arg("output_mask") = std::array<bool, 5>{true, true, true, true, true});
  m.def("masked_linear_backward_sgd_", torch::wrap_pybind_function_no_gil(&metamask::masked_linear_backward_sgd_));
  m.def("packed_masked_linear", torch::wrap_pybind_function_no_gil(&metamask::packed_masked_linear), arg("input"), arg("slots"),
        arg("weight"), arg("packed"), arg("bias"), arg("packed_bias"), arg("groups"), arg("dtype") = none);
  m.def("has_tangent", &metamask::has_tangent, arg("tensor"), "Whether forward-mode AD has given a tensor a tangent.");
  pybind11::enum_<metamask::cpu::Pass>(m, "Pass")
      .value("forward", metamask::cpu::Pass::kForward)
      .value("backward", metamask::cpu::Pass::kBackward);
  m.def("set_products", &metamask::cpu::set_products, arg("lines"), arg("task_rows"),
        "Replaces the table that csrc/cpu/products.h describes.");
  m.def("through_blas", &metamask::cpu::through_blas, arg("pass"), arg("type"), arg("batch"), arg("in_features"),
        arg("out_features"), "Whether a product of this size goes through BLAS.");
  m.def("second_level_cache", &metamask::cpu::second_level_cache, "The bytes of the second-level cache, by which panels are cut.");
  m.def("build_info", &metamask::build_info, "What this binary was built for and runs with.");
}
