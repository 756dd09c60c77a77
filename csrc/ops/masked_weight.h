// masked_weight and its derivatives over torch tensors, for a Device that runs the loops: checks, memory order and results are the
// same on every device.
//
// Device::Guard makes the tensors' device current; Device::gradient_like allocates an array for a parameter's gradient.
// Device::forward, backward and double_backward work on `n` elements in one order; `types` are those of weight and mask. A null
// input is zero, a null output is not computed. backward gives each parameter's gradient to a Sink.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "ops/checks.h"

namespace metamask {

template <class Device>
struct MaskedWeight {
  static at::Tensor forward(const at::Tensor& weight, const at::Tensor& mask_logits, int64_t gate_id, double gate_param,
                            std::optional<at::ScalarType> dtype) {
    check_gate(gate_id, gate_param);
    check_pair(weight, mask_logits);
    const at::ScalarType out = dtype.value_or(weight.scalar_type());
    check_storage("dtype", out, weight);
    const typename Device::Guard guard(weight);
    const at::Tensor w = dense(weight), m = laid_out_as(mask_logits, w);
    at::Tensor theta = at::empty_like(w, w.options().dtype(out));
    Device::forward(Gate{GateKind(gate_id), gate_param}, types_of(w, m), type_of(out), data_in_order("weight", w, w),
                    data_in_order("mask_logits", m, w), mutable_data_in_order("theta", theta, w), w.numel());
    return theta;
  }

  static std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& weight,
                                                     const at::Tensor& mask_logits, int64_t gate_id, double gate_param,
                                                     std::array<bool, 2> output_mask) {
    return backward_or_update(grad, weight, mask_logits, Gate{GateKind(gate_id), gate_param}, output_mask, {}, {});
  }

  // The same, except that a parameter with updates[i] takes a step of SGD instead of giving its gradient.
  static std::tuple<at::Tensor, at::Tensor> backward_sgd(const at::Tensor& grad, const at::Tensor& weight,
                                                         const at::Tensor& mask_logits,
                                                         const std::optional<at::Tensor>& weight_momentum_buffer,
                                                         const std::optional<at::Tensor>& mask_momentum_buffer, int64_t gate_id,
                                                         double gate_param, std::array<bool, 2> output_mask,
                                                         std::array<bool, 2> updates, at::ArrayRef<double> weight_settings,
                                                         at::ArrayRef<double> mask_settings) {
    check_pair(weight, mask_logits);
    std::array<Update, 2> made;
    if (updates[0]) made[0] = sgd_update("weight", weight_momentum_buffer, weight_settings, weight);
    if (updates[1]) made[1] = sgd_update("mask_logits", mask_momentum_buffer, mask_settings, mask_logits);
    return backward_apart(grad, weight, mask_logits, Gate{GateKind(gate_id), gate_param}, output_mask, made);
  }

  // The same with steps of AdamW.
  static std::tuple<at::Tensor, at::Tensor> backward_adamw(const at::Tensor& grad, const at::Tensor& weight,
                                                           const at::Tensor& mask_logits, at::TensorList state, int64_t gate_id,
                                                           double gate_param, std::array<bool, 2> output_mask,
                                                           std::array<bool, 2> updates, at::ArrayRef<double> settings) {
    check_pair(weight, mask_logits);
    const AdamWArguments arguments{state, settings, updates};
    arguments.check();
    std::array<Update, 2> made;
    if (updates[0]) made[0] = arguments.update(0, "weight", weight);
    if (updates[1]) made[1] = arguments.update(1, "mask_logits", mask_logits);
    return backward_apart(grad, weight, mask_logits, Gate{GateKind(gate_id), gate_param}, output_mask, made);
  }

  static std::tuple<at::Tensor, at::Tensor> backward_apart(const at::Tensor& grad, const at::Tensor& weight,
                                                           const at::Tensor& mask_logits, Gate gate,
                                                           std::array<bool, 2> output_mask, const std::array<Update, 2>& updates) {
    check_apart({{{"weight", weight}, updates[0]}, {{"mask_logits", mask_logits}, updates[1]}}, {{"grad", grad}});
    return backward_or_update(resolved(grad), resolved(weight), resolved(mask_logits), gate, output_mask, updates[0], updates[1]);
  }

  static std::tuple<at::Tensor, at::Tensor> backward_or_update(const at::Tensor& grad, const at::Tensor& weight,
                                                               const at::Tensor& mask_logits, Gate gate,
                                                               std::array<bool, 2> output_mask, const Update& weight_update,
                                                               const Update& mask_update) {
    check_gate(gate.kind, gate.param);
    check_pair(weight, mask_logits);
    check_like("grad", grad, weight);
    const typename Device::Guard guard(weight);
    const at::Tensor w = dense(weight), m = laid_out_as(mask_logits, w), g = laid_out_as(grad, w);
    TORCH_CHECK_VALUE((!weight_update.wanted || w.is_same(weight)) && (!mask_update.wanted || m.is_same(mask_logits)),
                      "mask_logits must have the strides of weight to be updated in place, ", weight.strides(), ", got ",
                      mask_logits.strides());
    at::Tensor dw = output_mask[0] && !weight_update.wanted ? Device::gradient_like(w) : at::Tensor();
    at::Tensor dm = output_mask[1] && !mask_update.wanted ? Device::gradient_like(m) : at::Tensor();
    Device::backward(gate, types_of(w, m), type_of(g.scalar_type()), data_in_order("grad", g, w), data_in_order("weight", w, w),
                     data_in_order("mask_logits", m, w), sink(weight_update, w, dw), sink(mask_update, m, dm), w.numel());
    return {dw, dm};
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor> double_backward(const std::optional<at::Tensor>& cotangent_weight,
                                                                        const std::optional<at::Tensor>& cotangent_mask,
                                                                        const at::Tensor& grad, const at::Tensor& weight,
                                                                        const at::Tensor& mask_logits, int64_t gate_id,
                                                                        double gate_param, std::array<bool, 3> output_mask) {
    check_gate(gate_id, gate_param);
    check_pair(weight, mask_logits);
    check_like("grad", grad, weight);
    const typename Device::Guard guard(weight);
    const at::Tensor w = dense(weight), m = laid_out_as(mask_logits, w), g = laid_out_as(grad, w);
    const at::Tensor a = cotangent("cotangent_weight", cotangent_weight, w), b = cotangent("cotangent_mask", cotangent_mask, m);
    at::Tensor dg = output_mask[0] ? at::empty_like(w, w.options().dtype(g.scalar_type())) : at::Tensor();
    at::Tensor dw = output_mask[1] ? Device::gradient_like(w) : at::Tensor();
    at::Tensor dm = output_mask[2] ? Device::gradient_like(m) : at::Tensor();
    Device::double_backward(Gate{GateKind(gate_id), gate_param}, types_of(w, m), type_of(g.scalar_type()),
                            data_in_order("cotangent_weight", a, w), data_in_order("cotangent_mask", b, w),
                            data_in_order("grad", g, w), data_in_order("weight", w, w), data_in_order("mask_logits", m, w),
                            mutable_data_in_order("gradient of grad", dg, w), mutable_data_in_order("gradient of weight", dw, w),
                            mutable_data_in_order("gradient of mask_logits", dm, w), w.numel());
    return {dg, dw, dm};
  }

  static void register_in(torch::Library& library) {
    library.impl("masked_weight", &forward);
    library.impl("masked_weight_backward", &backward);
    library.impl("masked_weight_backward_sgd_", &backward_sgd);
    library.impl("masked_weight_double_backward", &double_backward);
  }

  // On CUDA torch's own fused kernel takes AdamW's steps.
  static void register_adamw_in(torch::Library& library) { library.impl("masked_weight_backward_adamw_", &backward_adamw); }
};

}  // namespace metamask
