// task_masked_linear and its derivatives over torch tensors: checks and shapes are the same on every device.
//
// Device::task_linear(arguments, x) gives y, [R, O] in the dtype of x; Device::task_linear_backward(arguments, dy, x, output_mask)
// the gradients; Device::task_linear_double_backward(arguments, cotangents, dy, x, output_mask) the gradient of dy and the other
// ones. x and dy are contiguous, [R, groups * K] and [R, O], with `rows_per_sample` rows for each sample. The device checks the
// values of slots.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/List.h>
#include <torch/library.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "ops/checks.h"

namespace metamask {

// One contiguous array of a parameter's shape for each task: parts of one tensor, or a tensor each (undefined: none).
struct TaskArrays {
  std::vector<at::Tensor> tensors;
  bool stacked = false;
  int64_t tasks = 0, bytes = 0;  // bytes: of one task's array
  Type type = Type::kFloat32;    // of all of them

  bool given() const { return !tensors.empty(); }

  // Bytes from one part of a stacked tensor to the next; 0 if one array is expanded for all tasks.
  int64_t step() const { return tensors[0].stride(0) * tensors[0].element_size(); }

  const void* data(int64_t task) const {
    return stacked ? data_of_part("masks", tensors[0], task) : metamask::data("a mask", tensors[task]);
  }

  void* mutable_data(int64_t task) {
    if (stacked) return static_cast<char*>(metamask::mutable_data("gradients of masks", tensors[0])) + task * step();
    return metamask::mutable_data("gradient of a mask", tensors[task]);
  }
};

// Checks and returns the tasks' logits for the parameter `like`: one tensor with a dimension more, or one tensor each.
inline TaskArrays task_arrays(const char* name, const char* like_name, at::TensorList given, const at::Tensor& like) {
  TaskArrays arrays;
  arrays.stacked = given.size() == 1 && given[0].dim() == like.dim() + 1;
  const at::ScalarType type = given.empty() ? like.scalar_type() : given[0].scalar_type();
  arrays.type = type_of(type);
  arrays.bytes = like.numel() * bytes_of(arrays.type);
  if (arrays.stacked) {
    const at::Tensor& all = given[0];
    check_mask_type(name, type, like_name, like.scalar_type());
    TORCH_CHECK_VALUE(all.sizes().slice(1) == like.sizes(), name, " must be T masks of the shape of ", like_name, ", ",
                      like.sizes(), ", got ", all.sizes());
    check_sizes(name, all.sizes());
    check_tasks(name, all.size(0));
    TORCH_CHECK_VALUE(all.device() == like.device(), name, " must be on the device of ", like_name, ", ", like.device(), ", got ",
                      all.device());
    arrays.tasks = all.size(0);
    // A meta-learner starts with one mask expanded for all tasks: it is not copied.
    const bool same = arrays.tasks > 0 && all.stride(0) == 0 && all[0].is_contiguous();
    arrays.tensors.push_back(same ? all : all.contiguous());
    return arrays;
  }
  arrays.tasks = int64_t(given.size());
  arrays.tensors.reserve(given.size());
  const bool fits = is_mask_type(type, like.scalar_type());
  for (int64_t task = 0; task < arrays.tasks; ++task) {
    const at::Tensor& one = given[task];
    // Builds the name only for a mask that is refused.
    if (!fits || one.scalar_type() != type || one.sizes() != like.sizes() || one.device() != like.device()) {
      check_pair(like, one, like_name, (std::string(name) + "[" + std::to_string(task) + "]").c_str());
      TORCH_CHECK_TYPE(one.scalar_type() == type, name, "[", task, "] must have the dtype of ", name, "[0], ", type, ", got ",
                       one.scalar_type());
    }
    arrays.tensors.push_back(one.is_contiguous() ? one : one.contiguous());
  }
  return arrays;
}

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// Checks and returns the cotangents of the gradients of `masks`, in their form and dtype; nothing if none is given.
inline TaskArrays task_cotangents(const char* name, const OptionalTensors& given, const TaskArrays& masks) {
  TaskArrays arrays{{}, masks.stacked, masks.tasks, masks.bytes, masks.type};
  bool any = false;
  TORCH_CHECK_VALUE(given.empty() || given.size() == masks.tensors.size(), "expected ", masks.tensors.size(), " ", name,
                    " tensors, one per mask, or none, got ", given.size());
  for (size_t i = 0; i < given.size(); ++i) {
    const std::optional<at::Tensor> one = given.get(i);
    arrays.tensors.emplace_back();
    if (!is_given(one)) continue;
    any = true;
    check_storage((std::string(name) + "[" + std::to_string(i) + "]").c_str(), one->scalar_type(), masks.tensors[i]);
    TORCH_CHECK_VALUE(one->sizes() == masks.tensors[i].sizes() && one->device() == masks.tensors[i].device(), name, "[", i,
                      "] must have the shape and device of its mask, ", masks.tensors[i].sizes(), " on ", masks.tensors[i].device(),
                      ", got ", one->sizes(), " on ", one->device());
    arrays.tensors.back() = resolved(*one).to(masks.tensors[i].scalar_type()).contiguous();
  }
  return any ? arrays : TaskArrays();
}

struct TaskArguments {
  at::Tensor slots, weight, bias;  // contiguous; bias undefined: there is none
  TaskArrays masks, bias_masks;    // no bias masks: the bias is not masked
  Gate gate;
  int64_t groups, rows_per_sample;
};

// The gradients of the arguments, undefined or empty if not wanted; or the cotangents of these gradients, empty if zero.
struct TaskGradients {
  at::Tensor input, weight;
  TaskArrays masks;
  at::Tensor bias;
  TaskArrays bias_masks;
};

template <class Device>
struct TaskMaskedLinear {
  using OptionalTensor = std::optional<at::Tensor>;
  using Gradients = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>, at::Tensor, std::vector<at::Tensor>>;
  using SecondGradients =
      std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>, at::Tensor, std::vector<at::Tensor>>;

  static at::Tensor forward(const at::Tensor& input, const at::Tensor& slots, const at::Tensor& weight, at::TensorList masks,
                            const OptionalTensor& bias, at::TensorList bias_masks, int64_t gate_id, double gate_param,
                            int64_t groups, std::optional<at::ScalarType> dtype) {
    const TaskArguments arguments = checked(input, slots, weight, masks, bias, bias_masks, gate_id, gate_param, groups);
    const at::ScalarType out = dtype.value_or(weight.scalar_type());
    check_storage("dtype", out, weight);
    const typename Device::Guard guard(weight);
    const NoAutocast no_autocast;
    const at::Tensor y = Device::task_linear(arguments, matrix(input, out));
    return input.dim() == 2 ? y : y.view(with_last(input, weight.size(0)));
  }

  static Gradients backward(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& slots, const at::Tensor& weight,
                            at::TensorList masks, const OptionalTensor& bias, at::TensorList bias_masks, int64_t gate_id,
                            double gate_param, int64_t groups, std::array<bool, 5> output_mask) {
    const TaskArguments arguments = checked(input, slots, weight, masks, bias, bias_masks, gate_id, gate_param, groups);
    check_batch_grad(grad, input, weight);
    const typename Device::Guard guard(weight);
    const NoAutocast no_autocast;
    const at::ScalarType product = grad.scalar_type();
    TaskGradients made = Device::task_linear_backward(arguments, matrix(grad, product), matrix(input, product), output_mask);
    return {shaped(made.input, input), made.weight, made.masks.tensors, made.bias, made.bias_masks.tensors};
  }

  static SecondGradients double_backward(const OptionalTensor& cotangent_input, const OptionalTensor& cotangent_weight,
                                         const OptionalTensors& cotangent_masks, const OptionalTensor& cotangent_bias,
                                         const OptionalTensors& cotangent_bias_masks, const at::Tensor& grad,
                                         const at::Tensor& input, const at::Tensor& slots, const at::Tensor& weight,
                                         at::TensorList masks, const OptionalTensor& bias, at::TensorList bias_masks,
                                         int64_t gate_id, double gate_param, int64_t groups, std::array<bool, 6> output_mask) {
    const TaskArguments arguments = checked(input, slots, weight, masks, bias, bias_masks, gate_id, gate_param, groups);
    check_batch_grad(grad, input, weight);
    const typename Device::Guard guard(weight);
    const NoAutocast no_autocast;
    const at::ScalarType product = grad.scalar_type();
    TaskGradients cotangents;
    if (is_given(cotangent_input)) {
      check_storage("cotangent_input", cotangent_input->scalar_type(), weight);
      TORCH_CHECK_VALUE(cotangent_input->sizes() == input.sizes(), "cotangent_input must have the shape of input, ", input.sizes(),
                        ", got ", cotangent_input->sizes());
      TORCH_CHECK_VALUE(cotangent_input->device() == input.device(), "cotangent_input must be on the device of input, ",
                        input.device(), ", got ", cotangent_input->device());
      cotangents.input = matrix(*cotangent_input, product);
    }
    cotangents.weight = cotangent("cotangent_weight", cotangent_weight, arguments.weight);
    cotangents.masks = task_cotangents("cotangent_masks", cotangent_masks, arguments.masks);
    if (is_given(cotangent_bias)) {
      TORCH_CHECK_VALUE(is_given(bias), "cotangent_bias needs a bias, got bias=None");
      check_storage("cotangent_bias", cotangent_bias->scalar_type(), weight);
      TORCH_CHECK_VALUE(cotangent_bias->sizes() == bias->sizes(), "cotangent_bias must have the shape of bias, ", bias->sizes(),
                        ", got ", cotangent_bias->sizes());
      TORCH_CHECK_VALUE(cotangent_bias->device() == bias->device(), "cotangent_bias must be on the device of bias, ",
                        bias->device(), ", got ", cotangent_bias->device());
      cotangents.bias = cotangent_bias->to(bias->scalar_type()).contiguous();
    }
    cotangents.bias_masks = task_cotangents("cotangent_bias_masks", cotangent_bias_masks, arguments.bias_masks);
    auto [dy, made] =
        Device::task_linear_double_backward(arguments, cotangents, matrix(grad, product), matrix(input, product), output_mask);
    return {shaped(dy, grad), shaped(made.input, input), made.weight, made.masks.tensors, made.bias, made.bias_masks.tensors};
  }

  static void register_in(torch::Library& library) {
    library.impl("task_masked_linear", &forward);
    library.impl("task_masked_linear_backward", &backward);
    library.impl("task_masked_linear_double_backward", &double_backward);
  }

 private:
  static TaskArguments checked(const at::Tensor& input, const at::Tensor& slots, const at::Tensor& weight, at::TensorList masks,
                               const OptionalTensor& bias, at::TensorList bias_masks, int64_t gate_id, double gate_param,
                               int64_t groups) {
    if (gate_id != kIdentity || !weight.is_cpu()) check_gate(gate_id, gate_param);
    check_pair(weight, weight);
    TaskArguments arguments{
        slots, weight.contiguous(), {}, task_arrays("masks", "weight", masks, weight), {}, {GateKind(gate_id), gate_param}, groups,
        0};
    TORCH_CHECK_VALUE(weight.dim() == 2, "weight must be [out, in], got shape ", weight.sizes());
    TORCH_CHECK_VALUE(groups > 0 && weight.size(0) % groups == 0, "groups must divide the rows of weight, ", weight.size(0),
                      ", got ", groups);
    check_batch_input(input, weight, groups);
    check_slots(slots, input, weight);
    arguments.slots = slots.contiguous();
    arguments.rows_per_sample = rows_per_sample(input);
    if (is_given(bias)) {
      check_bias(weight, *bias);
      arguments.bias = bias->contiguous();
    }
    if (!bias_masks.empty()) {
      TORCH_CHECK_VALUE(is_given(bias), "bias_masks needs a bias, got bias=None");
      arguments.bias_masks = task_arrays("bias_masks", "bias", bias_masks, *bias);
      TORCH_CHECK_VALUE(arguments.bias_masks.tasks == arguments.masks.tasks, "bias_masks must have as many tasks as masks, ",
                        arguments.masks.tasks, ", got ", arguments.bias_masks.tasks);
    }
    return arguments;
  }

  // Gives the gradient, from its rows, the shape and dtype of `like`.
  static at::Tensor shaped(const at::Tensor& rows, const at::Tensor& like) {
    if (!rows.defined()) return rows;
    return (like.dim() == 2 ? rows : rows.view(like.sizes())).to(like.scalar_type());
  }
};

}  // namespace metamask
