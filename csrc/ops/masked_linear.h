// masked_linear and its gradients over torch tensors: checks, shapes and the bias are the same on every device.
//
// Device::linear(x, w, m, b, gate) gives y = x theta^T (+ b), [B, O] in the dtype of x. Device::linear_backward(dy, x, w, m, gate,
// needs_dx, dw, dm) gives dx if it is needed, and the parameters' gradients to their sinks. x and dy are contiguous, [B, K] and
// [B, O]; w and m are contiguous, [O, K]; b is contiguous, [O], or undefined.
#pragma once

#include "ops/masked_weight.h"

namespace metamask {

template <class Device>
struct MaskedLinear {
  using OptionalTensor = std::optional<at::Tensor>;

  static at::Tensor forward(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& mask_logits,
                            const OptionalTensor& bias, const OptionalTensor& bias_mask_logits, int64_t gate_id, double gate_param,
                            std::optional<at::ScalarType> dtype) {
    check_gate(gate_id, gate_param);
    check_pair(weight, mask_logits);
    check_linear(input, weight, bias, bias_mask_logits);
    const at::ScalarType out = dtype.value_or(weight.scalar_type());
    check_storage("dtype", out, weight);
    const typename Device::Guard guard(weight);
    const NoAutocast no_autocast;
    at::Tensor b;
    if (is_given(bias)) {
      b = is_given(bias_mask_logits) ? MaskedWeight<Device>::forward(*bias, *bias_mask_logits, gate_id, gate_param, out)
                                     : bias->to(out).contiguous();
    }
    const at::Tensor y =
        Device::linear(matrix(input, out), weight.contiguous(), mask_logits.contiguous(), b, Gate{GateKind(gate_id), gate_param});
    return input.dim() == 2 ? y : y.view(with_last(input, weight.size(0)));
  }

  using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

  static Gradients backward(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
                            const at::Tensor& mask_logits, const OptionalTensor& bias, const OptionalTensor& bias_mask_logits,
                            int64_t gate_id, double gate_param, std::array<bool, 5> output_mask) {
    return backward_or_update(grad, input, weight, mask_logits, bias, bias_mask_logits, Gate{GateKind(gate_id), gate_param},
                              output_mask, {});
  }

  // The same, except that weight, mask, bias and bias mask with updates[i] take a step of SGD instead of giving their gradients.
  static Gradients backward_sgd(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
                                const at::Tensor& mask_logits, const OptionalTensor& bias, const OptionalTensor& bias_mask_logits,
                                const OptionalTensor& weight_momentum_buffer, const OptionalTensor& mask_momentum_buffer,
                                const OptionalTensor& bias_momentum_buffer, const OptionalTensor& bias_mask_momentum_buffer,
                                int64_t gate_id, double gate_param, std::array<bool, 5> output_mask, std::array<bool, 4> updates,
                                at::ArrayRef<double> settings) {
    TORCH_CHECK_VALUE(settings.size() == 12, "settings must be lr, weight_decay and momentum of four parameters, got ",
                      settings.size(), " numbers");
    const std::array<const OptionalTensor*, 4> buffers = {&weight_momentum_buffer, &mask_momentum_buffer, &bias_momentum_buffer,
                                                          &bias_mask_momentum_buffer};
    return backward_and_update(grad, input, weight, mask_logits, bias, bias_mask_logits, Gate{GateKind(gate_id), gate_param},
                               output_mask, updates, [&](size_t index, const char* name, const at::Tensor& parameter) {
                                 return sgd_update(name, *buffers[index], settings.slice(3 * index, 3), parameter);
                               });
  }

  // The same with steps of AdamW.
  static Gradients backward_adamw(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
                                  const at::Tensor& mask_logits, const OptionalTensor& bias, const OptionalTensor& bias_mask_logits,
                                  at::TensorList state, int64_t gate_id, double gate_param, std::array<bool, 5> output_mask,
                                  std::array<bool, 4> updates, at::ArrayRef<double> settings) {
    const AdamWArguments arguments{state, settings, updates};
    arguments.check();
    return backward_and_update(
        grad, input, weight, mask_logits, bias, bias_mask_logits, Gate{GateKind(gate_id), gate_param}, output_mask, updates,
        [&](size_t index, const char* name, const at::Tensor& parameter) { return arguments.update(index, name, parameter); });
  }

  // make_update(index, name, parameter) checks and returns the update of each parameter that takes a step.
  template <class MakeUpdate>
  static Gradients backward_and_update(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
                                       const at::Tensor& mask_logits, const OptionalTensor& bias,
                                       const OptionalTensor& bias_mask_logits, Gate gate, std::array<bool, 5> output_mask,
                                       std::array<bool, 4> updates, const MakeUpdate& make_update) {
    check_pair(weight, mask_logits);
    check_linear(input, weight, bias, bias_mask_logits);
    TORCH_CHECK_VALUE(!(updates[2] || updates[3]) || is_given(bias_mask_logits), "bias must have logits to be updated here");
    std::array<Update, 4> made;
    if (updates[0]) made[0] = make_update(0, "weight", weight);
    if (updates[1]) made[1] = make_update(1, "mask_logits", mask_logits);
    if (updates[2]) made[2] = make_update(2, "bias", *bias);
    if (updates[3]) made[3] = make_update(3, "bias_mask_logits", *bias_mask_logits);
    for (const auto& [name, updated, parameter] :
         {std::tuple{"weight", updates[0], weight}, std::tuple{"mask_logits", updates[1], mask_logits}}) {
      TORCH_CHECK_VALUE(!updated || parameter.is_contiguous(), name, " must be contiguous to be updated in place, got strides ",
                        parameter.strides());
    }
    check_apart({{{"weight", weight}, made[0]},
                 {{"mask_logits", mask_logits}, made[1]},
                 {{"bias", bias.value_or(at::Tensor())}, made[2]},
                 {{"bias_mask_logits", bias_mask_logits.value_or(at::Tensor())}, made[3]}},
                {{"grad", grad}, {"input", input}});
    return backward_or_update(resolved(grad), resolved(input), resolved(weight), resolved(mask_logits), resolved(bias),
                              resolved(bias_mask_logits), gate, output_mask, made);
  }

  // A bias without logits has the sum over the batch as its gradient.
  static Gradients backward_or_update(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
                                      const at::Tensor& mask_logits, const OptionalTensor& bias,
                                      const OptionalTensor& bias_mask_logits, Gate gate, std::array<bool, 5> output_mask,
                                      const std::array<Update, 4>& updates) {
    check_gate(gate.kind, gate.param);
    check_pair(weight, mask_logits);
    check_linear(input, weight, bias, bias_mask_logits);
    check_storage("grad", grad.scalar_type(), weight);
    const std::vector<int64_t> sizes = with_last(input, weight.size(0));
    TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(sizes), "grad must be [..., out] = ", at::IntArrayRef(sizes), ", got ",
                      grad.sizes());
    TORCH_CHECK_VALUE(grad.device() == weight.device(), "grad must be on the device of weight, ", weight.device(), ", got ",
                      grad.device());
    const typename Device::Guard guard(weight);
    const NoAutocast no_autocast;
    const at::Tensor dy = matrix(grad, grad.scalar_type()), x = matrix(input, grad.scalar_type());
    const at::Tensor w = weight.contiguous(), m = mask_logits.contiguous();
    at::Tensor dw = output_mask[1] && !updates[0].wanted ? Device::gradient_like(w) : at::Tensor();
    at::Tensor dm = output_mask[2] && !updates[1].wanted ? Device::gradient_like(m) : at::Tensor();
    const Sink to_w = sink(updates[0], w, dw), to_m = sink(updates[1], m, dm);
    // Without weights, an empty sum.
    at::Tensor dx = w.numel() == 0 ? (output_mask[0] ? at::zeros_like(x) : at::Tensor())
                                   : Device::linear_backward(dy, x, w, m, gate, output_mask[0], to_w, to_m);
    if (output_mask[0] && input.dim() != 2) dx = dx.view(input.sizes());
    if (output_mask[0] && dx.scalar_type() != input.scalar_type()) dx = dx.to(input.scalar_type());
    at::Tensor db, dbm;
    const bool masked_bias = is_given(bias_mask_logits);
    if (is_given(bias) && (output_mask[3] || (masked_bias && (output_mask[4] || updates[2].wanted || updates[3].wanted)))) {
      // What becomes the gradient of float32 logits is not rounded to 16 bits.
      const bool widened = masked_bias && bias_mask_logits->scalar_type() != bias->scalar_type();
      db = dy.sum(0, false, widened ? at::kFloat : dy.scalar_type());
      if (masked_bias) {
        std::tie(db, dbm) = MaskedWeight<Device>::backward_or_update(db, *bias, *bias_mask_logits, gate,
                                                                     {output_mask[3], output_mask[4]}, updates[2], updates[3]);
      } else {
        db = db.to(bias->scalar_type());
      }
    }
    return {dx, dw, dm, db, dbm};
  }

  static void register_in(torch::Library& library) {
    library.impl("masked_linear", &forward);
    library.impl("masked_linear_backward", &backward);
    library.impl("masked_linear_backward_sgd_", &backward_sgd);
  }

  // On CUDA torch's own fused kernel takes AdamW's steps.
  static void register_adamw_in(torch::Library& library) { library.impl("masked_linear_backward_adamw_", &backward_adamw); }
};

}  // namespace metamask
