// Argument checks of the ops, and the memory layout that the kernels ask for. A message names the argument, what was wanted and
// what came; the checks in Python use the same words.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "core/types.h"
#include "ops/memory.h"

namespace metamask {

// The most elements of an argument or a result. Of an empty tensor too, whose sizes nothing else bounds: strides, counts of bytes
// and numbers of rows then fit int64_t, and so do sums of a few.
constexpr int64_t kMostElements = int64_t(1) << 48;
// The most tasks. One mask expanded for all tasks costs no memory, and a count of rows for each does.
constexpr int64_t kMostTasks = int64_t(1) << 24;

// Returns the number of elements, a size of 0 counted as 1; more than kMostElements if it is more.
inline int64_t bounded_elements(at::IntArrayRef sizes) {
  int64_t all = 1;
  for (const int64_t n : sizes) {
    if (n > 1 && (__builtin_mul_overflow(all, n, &all) || all > kMostElements)) return kMostElements + 1;
  }
  return all;
}

inline void check_sizes(const char* name, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(bounded_elements(sizes) <= kMostElements, name,
                    " must have at most 2**48 elements, with 1 for each size of 0, got ", sizes);
}

inline void check_tasks(const char* name, int64_t tasks) {
  TORCH_CHECK_VALUE(tasks <= kMostTasks, name, " must hold at most 2**24 tasks, got ", tasks);
}

inline void check_gate(int64_t gate_id, double gate_param) {
  TORCH_CHECK_VALUE(gate_id == kSigmoid || gate_id == kHard, "gate must be 0 (sigmoid) or 1 (hard), got ", gate_id);
  // The inverse must be finite too, in float32.
  TORCH_CHECK_VALUE(gate_id != kSigmoid || (gate_param >= 0x1p-126 && gate_param < std::numeric_limits<double>::infinity()),
                    "temperature must be finite and greater than 0, got ", gate_param, " (the least is 2**-126)");
  TORCH_CHECK_VALUE(gate_param == gate_param, "threshold must be a number, got nan");
}

inline bool is_masked_type(at::ScalarType type) {
  return type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

inline Type type_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return Type::kFloat64;
    case at::kBFloat16: return Type::kBFloat16;
    case at::kHalf: return Type::kFloat16;
    default: return Type::kFloat32;
  }
}

inline bool is_16_bit(at::ScalarType type) { return type == at::kBFloat16 || type == at::kHalf; }

// The types of a weight and its logits, which check_pair has seen.
inline ParamTypes types_of(const at::Tensor& weight, const at::Tensor& mask_logits) {
  return {type_of(weight.scalar_type()), type_of(mask_logits.scalar_type())};
}

// The arithmetic of float64 parameters is float64, of all others float32.
inline at::ScalarType compute_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline bool is_given(const std::optional<at::Tensor>& tensor) { return tensor.has_value() && tensor->defined(); }

inline void check_masked_type(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(is_masked_type(tensor.scalar_type()), name, " must be float64, float32, bfloat16 or float16, got ",
                   tensor.scalar_type());
}

// float32 logits go with any weight but one of float64.
inline bool is_mask_type(at::ScalarType mask, at::ScalarType weight) {
  return mask == weight || (mask == at::kFloat && is_16_bit(weight));
}

inline void check_mask_type(const char* mask_name, at::ScalarType mask, const char* weight_name, at::ScalarType weight) {
  TORCH_CHECK_TYPE(is_mask_type(mask, weight), mask_name, " must have the dtype of ", weight_name,
                   is_16_bit(weight) ? ", or float32 beside " : ", ", weight, ", got ", mask);
}

inline void check_pair(const at::Tensor& weight, const at::Tensor& mask_logits, const char* weight_name = "weight",
                       const char* mask_name = "mask_logits") {
  check_masked_type(weight_name, weight);
  check_mask_type(mask_name, mask_logits.scalar_type(), weight_name, weight.scalar_type());
  check_sizes(weight_name, weight.sizes());
  TORCH_CHECK_VALUE(mask_logits.sizes() == weight.sizes(), mask_name, " must have the shape of ", weight_name, ", ", weight.sizes(),
                    ", got ", mask_logits.sizes());
  TORCH_CHECK_VALUE(mask_logits.device() == weight.device(), mask_name, " must be on the device of ", weight_name, ", ",
                    weight.device(), ", got ", mask_logits.device());
}

// float64 parameters compute in float64, and only there.
inline void check_storage(const char* name, at::ScalarType type, const at::Tensor& weight) {
  TORCH_CHECK_TYPE(
      is_masked_type(type) && (type == at::kDouble) == (weight.scalar_type() == at::kDouble), name,
      weight.scalar_type() == at::kDouble ? " must be float64 as weight is, got " : " must be float32, bfloat16 or float16, got ",
      type);
}

inline void check_like(const char* name, const at::Tensor& tensor, const at::Tensor& weight) {
  check_storage(name, tensor.scalar_type(), weight);
  TORCH_CHECK_VALUE(tensor.sizes() == weight.sizes(), name, " must have the shape of weight, ", weight.sizes(), ", got ",
                    tensor.sizes());
  TORCH_CHECK_VALUE(tensor.device() == weight.device(), name, " must be on the device of weight, ", weight.device(), ", got ",
                    tensor.device());
}

// Checks the slots of a mixed-task batch, except for their values.
inline void check_slots(const at::Tensor& slots, const at::Tensor& input, const at::Tensor& weight) {
  TORCH_CHECK_TYPE(slots.scalar_type() == at::kLong, "slots must be int64, got ", slots.scalar_type());
  TORCH_CHECK_VALUE(slots.sizes() == input.sizes().slice(0, 1), "slots must be [B] = ", input.sizes().slice(0, 1), " as in input ",
                    input.sizes(), ", got ", slots.sizes());
  TORCH_CHECK_VALUE(slots.device() == weight.device(), "slots must be on the device of weight, ", weight.device(), ", got ",
                    slots.device());
}

// Checks one slot in host memory. Slots on a GPU are checked by the kernels that use them.
inline void check_slot(int64_t slot, int64_t tasks, int64_t position) {
  TORCH_CHECK_VALUE(slot >= 0 && slot < tasks, "slots must be in [0, ", tasks, "), got ", slot, " at position ", position);
}

inline void check_bias(const at::Tensor& weight, const at::Tensor& bias) {
  TORCH_CHECK_TYPE(bias.scalar_type() == weight.scalar_type(), "bias must have the dtype of weight, ", weight.scalar_type(),
                   ", got ", bias.scalar_type());
  TORCH_CHECK_VALUE(bias.sizes() == weight.sizes().slice(0, 1), "bias must be [out] = ", weight.sizes().slice(0, 1), ", got ",
                    bias.sizes());
  TORCH_CHECK_VALUE(bias.device() == weight.device(), "bias must be on the device of weight, ", weight.device(), ", got ",
                    bias.device());
}

// Checks the sizes of an input, [..., in], and of the output that it has with a weight of `out` rows.
inline void check_rows(const at::Tensor& input, int64_t out) {
  check_sizes("input", input.sizes());
  const int64_t rows = bounded_elements(input.sizes().slice(0, input.dim() - 1));
  TORCH_CHECK_VALUE(rows <= kMostElements / std::max<int64_t>(out, 1),
                    "the output must have at most 2**48 elements, with 1 for each size of 0, got input ", input.sizes(),
                    " with out = ", out);
}

inline void check_linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                         const std::optional<at::Tensor>& bias_mask_logits) {
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must be [out, in], got shape ", weight.sizes());
  check_storage("input", input.scalar_type(), weight);
  TORCH_CHECK_VALUE(input.dim() > 0 && input.size(-1) == weight.size(1), "input must be [..., in] with in = ", weight.size(1),
                    " as in weight ", weight.sizes(), ", got ", input.sizes());
  check_rows(input, weight.size(0));
  TORCH_CHECK_VALUE(input.device() == weight.device(), "input must be on the device of weight, ", weight.device(), ", got ",
                    input.device());
  if (is_given(bias)) check_bias(weight, *bias);
  if (is_given(bias_mask_logits)) {
    TORCH_CHECK_VALUE(is_given(bias), "bias_mask_logits needs a bias, got bias=None");
    check_pair(*bias, *bias_mask_logits, "bias", "bias_mask_logits");
  }
}

// Checks the input of a mixed-task batch, [B, ..., groups * in].
inline void check_batch_input(const at::Tensor& input, const at::Tensor& weight, int64_t groups) {
  check_storage("input", input.scalar_type(), weight);
  TORCH_CHECK_VALUE(groups <= kMostElements / std::max<int64_t>(weight.size(1), 1),
                    "groups times the columns of weight must be at most 2**48, got groups=", groups, " and weight ",
                    weight.sizes());
  TORCH_CHECK_VALUE(input.dim() > 1 && input.size(-1) == groups * weight.size(1),
                    "input must be [B, ..., in] with in = ", groups * weight.size(1), " as in weight ", weight.sizes(),
                    " with groups=", groups, ", got ", input.sizes());
  check_rows(input, weight.size(0));
  TORCH_CHECK_VALUE(input.device() == weight.device(), "input must be on the device of weight, ", weight.device(), ", got ",
                    input.device());
}

// Returns the number of rows that each sample of a mixed-task batch has.
inline int64_t rows_per_sample(const at::Tensor& input) { return c10::multiply_integers(input.sizes().slice(1, input.dim() - 2)); }

// Returns the sizes of `tensor` with another last one.
inline std::vector<int64_t> with_last(const at::Tensor& tensor, int64_t last) {
  std::vector<int64_t> sizes = tensor.sizes().vec();
  sizes.back() = last;
  return sizes;
}

// Checks the gradient of a mixed-task batch's output, [B, ..., out].
inline void check_batch_grad(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight) {
  check_storage("grad", grad.scalar_type(), weight);
  const std::vector<int64_t> sizes = with_last(input, weight.size(0));
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(sizes), "grad must be [B, ..., out] = ", at::IntArrayRef(sizes), ", got ",
                    grad.sizes());
  TORCH_CHECK_VALUE(grad.device() == weight.device(), "grad must be on the device of weight, ", weight.device(), ", got ",
                    grad.device());
}

// Returns the rows of `tensor` as one contiguous matrix in `dtype`.
inline at::Tensor matrix(const at::Tensor& tensor, at::ScalarType dtype) {
  // The shortcut comes first: each of the calls below takes as long as a small layer's arithmetic.
  if (tensor.dim() == 2 && tensor.scalar_type() == dtype && tensor.is_contiguous()) return tensor;
  const int64_t rows = c10::multiply_integers(tensor.sizes().slice(0, tensor.dim() - 1));
  return tensor.to(dtype).reshape({rows, tensor.size(-1)}).contiguous();
}

// Keeps autocast, where it is on, from changing the dtype of a product that is already decided.
struct NoAutocast {
  const c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// An in-place step that a parameter takes instead of giving its gradient: of AdamW where its means are defined, else of SGD.
struct Update {
  bool wanted = false;
  Sgd sgd = {};
  at::Tensor momentum_buffer;  // undefined: no momentum
  AdamW adamw = {};
  at::Tensor exp_avg, exp_avg_sq, count;  // the means, and how many steps were taken
  double step = 0;                        // the number of this one, from 1
};

inline void check_updated(const char* name, const at::Tensor& parameter) {
  TORCH_CHECK_VALUE(parameter.is_non_overlapping_and_dense(), name, " must be dense to be updated in place");
  TORCH_CHECK_VALUE(holds_its_values(parameter), name, " must hold its values to be updated in place, got a lazy view: call ",
                    "resolve_neg");
}

// Checks a tensor of a parameter's size that a step updates too; `kind` is "the momentum buffer of ", for example.
inline void check_state(const char* kind, const char* name, const at::Tensor& state, const at::Tensor& parameter) {
  TORCH_CHECK_VALUE(holds_its_values(state), kind, name,
                    " must hold its values to be updated in place, got a lazy view: call resolve_neg");
  TORCH_CHECK_VALUE(state.sizes() == parameter.sizes() && state.strides() == parameter.strides() &&
                        state.scalar_type() == parameter.scalar_type() && state.device() == parameter.device(),
                    kind, name, " must have its shape, strides, dtype and device, got ", state.sizes(), ", ", state.strides(), ", ",
                    state.scalar_type(), " on ", state.device());
}

// Checks and returns an update of SGD. `settings` are lr, weight_decay and momentum.
inline Update sgd_update(const char* name, const std::optional<at::Tensor>& momentum_buffer, at::ArrayRef<double> settings,
                         const at::Tensor& parameter) {
  TORCH_CHECK_VALUE(settings.size() == 3, "the settings of ", name, " must be lr, weight_decay and momentum, got ", settings.size(),
                    " numbers");
  Update made;
  made.wanted = true;
  made.sgd = {settings[0], settings[1], settings[2]};
  check_updated(name, parameter);
  if (is_given(momentum_buffer)) {
    made.momentum_buffer = *momentum_buffer;
    check_state("the momentum buffer of ", name, *momentum_buffer, parameter);
  }
  TORCH_CHECK_VALUE(made.momentum_buffer.defined() || made.sgd.momentum == 0, name, " has momentum ", made.sgd.momentum,
                    " and no buffer");
  return made;
}

// The arguments of the steps of AdamW that `parameters` parameters take where updates[i]: `state` is exp_avg, exp_avg_sq and the
// count of steps of each that is updated, `settings` lr, beta1, beta2, eps and weight_decay of each.
struct AdamWArguments {
  at::TensorList state;
  at::ArrayRef<double> settings;
  at::ArrayRef<bool> updates;

  void check() const {
    const size_t updated = std::count(updates.begin(), updates.end(), true);
    TORCH_CHECK_VALUE(settings.size() == 5 * updates.size(), "settings must be lr, beta1, beta2, eps and weight_decay of ",
                      updates.size(), " parameters, got ", settings.size(), " numbers");
    TORCH_CHECK_VALUE(state.size() == 3 * updated, "state must be exp_avg, exp_avg_sq and step of ", updated,
                      " updated parameters, got ", state.size(), " tensors");
  }

  // Checks and returns the update of one parameter.
  Update update(size_t parameter_index, const char* name, const at::Tensor& parameter) const {
    const size_t place = std::count(updates.begin(), updates.begin() + parameter_index, true);
    const at::ArrayRef<double> its = settings.slice(5 * parameter_index, 5);
    const double lr = its[0], beta1 = its[1], beta2 = its[2];
    TORCH_CHECK_VALUE(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1, "the betas of ", name, " must be in [0, 1), got ", beta1,
                      " and ", beta2);
    check_updated(name, parameter);
    Update made;
    made.wanted = true;
    made.exp_avg = state[3 * place];
    made.exp_avg_sq = state[3 * place + 1];
    made.count = state[3 * place + 2];
    check_state("exp_avg of ", name, made.exp_avg, parameter);
    check_state("exp_avg_sq of ", name, made.exp_avg_sq, parameter);
    TORCH_CHECK_VALUE(made.count.numel() == 1 && holds_its_values(made.count) && made.count.device() == parameter.device() &&
                          (made.count.scalar_type() == at::kFloat || made.count.scalar_type() == at::kDouble),
                      "step of ", name, " must be one float32 or float64 number on its device, got ", made.count.sizes(), ", ",
                      made.count.scalar_type(), " on ", made.count.device());
    made.step = 1 + (made.count.scalar_type() == at::kFloat ? *data<float>("step", made.count) : *data<double>("step", made.count));
    made.adamw = {
        1 - lr * its[4], beta1, beta2, lr / (1 - std::pow(beta1, made.step)), 1 / std::sqrt(1 - std::pow(beta2, made.step)),
        its[3]};
    return made;
  }
};

struct Argument {
  const char* name;
  const at::Tensor& tensor;
};

// Refuses to update a parameter, or what the optimiser keeps of it, that shares memory with another argument: what is read there
// would depend on the order of the work. `parameters` are all of the op's, with their updates.
inline void check_apart(std::initializer_list<std::pair<Argument, const Update&>> parameters,
                        std::initializer_list<Argument> others) {
  struct Part {
    const char* name;
    Extent extent;
    bool updated;
  };
  c10::SmallVector<Part, 18> parts;
  for (const auto& [argument, update] : parameters) {
    parts.push_back({argument.name, Extent(argument.tensor), update.wanted});
    if (!update.wanted) continue;
    const std::initializer_list<Argument> state = {{"a momentum buffer", update.momentum_buffer},
                                                   {"exp_avg", update.exp_avg},
                                                   {"exp_avg_sq", update.exp_avg_sq},
                                                   {"step", update.count}};
    for (const Argument& each : state) {
      if (each.tensor.defined()) parts.push_back({each.name, Extent(each.tensor), true});
    }
  }
  for (const Argument& argument : others) parts.push_back({argument.name, Extent(argument.tensor), false});
  for (const Part& one : parts) {
    for (const Part& other : parts) {
      TORCH_CHECK_VALUE(&one == &other || !one.updated || !one.extent.meets(other.extent), one.name, " must not share memory with ",
                        other.name, " to be updated in place");
    }
  }
}

// Returns the destination of a parameter's gradient: the parameter, or `gradient` if that is defined, or none. Counts the step, and
// bumps the version of what the op writes: autograd does not see an op write to its arguments, and those who saved the parameter
// must notice.
inline Sink sink(const Update& update, const at::Tensor& parameter, const at::Tensor& gradient) {
  if (!update.wanted) return {mutable_data_in_order("gradient", gradient, parameter)};
  for (const at::Tensor& changed : {parameter, update.momentum_buffer, update.exp_avg, update.exp_avg_sq, update.count}) {
    if (changed.defined() && !changed.is_inference()) changed.unsafeGetTensorImpl()->bump_version();
  }
  if (update.count.defined()) {
    if (update.count.scalar_type() == at::kFloat) *mutable_data<float>("step", update.count) = float(update.step);
    else *mutable_data<double>("step", update.count) = update.step;
  }
  return {nullptr,
          mutable_data_in_order("parameter", parameter, parameter),
          mutable_data_in_order("momentum_buffer", update.momentum_buffer, parameter),
          update.sgd,
          mutable_data_in_order("exp_avg", update.exp_avg, parameter),
          mutable_data_in_order("exp_avg_sq", update.exp_avg_sq, parameter),
          update.adamw};
}

// Returns the cotangent of the gradient of `parameter` (a weight, or logits in its memory order), in its dtype and memory order;
// undefined if not given.
inline at::Tensor cotangent(const char* name, const std::optional<at::Tensor>& given, const at::Tensor& parameter) {
  if (!is_given(given)) return at::Tensor();
  check_like(name, *given, parameter);
  return laid_out_as(resolved(*given).to(parameter.scalar_type()), parameter);
}

}  // namespace metamask
