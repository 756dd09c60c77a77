// masked_weight and its derivatives for a list of weights, as masked_weight.h for one: the layers of a small net together. All
// weights of a list have one dtype, and one device, and all logits one dtype; each has its own shape and memory order.
//
// Device::forward_list, backward_list and double_backward_list work on the arrays of a whole list.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/List.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "ops/checks.h"

namespace metamask {

template <class Device>
struct MaskedWeightList {
  using Tensors = std::vector<at::Tensor>;
  using OptionalTensors = c10::List<std::optional<at::Tensor>>;

  static Tensors forward(at::TensorList weight, at::TensorList mask_logits, int64_t gate_id, double gate_param,
                         std::optional<at::ScalarType> dtype) {
    const Pairs pairs(weight, mask_logits, gate_id, gate_param);
    const at::ScalarType out = dtype.value_or(weight[0].scalar_type());
    check_storage("dtype", out, weight[0]);
    const typename Device::Guard guard(weight[0]);
    Tensors thetas;
    std::vector<ForwardArrays> arrays;
    for (size_t i = 0; i < weight.size(); ++i) {
      const at::Tensor& w = pairs.w[i];
      at::Tensor& theta = thetas.emplace_back(at::empty_like(w, w.options().dtype(out)));
      arrays.push_back({data_in_order("weight", w, w), data_in_order("mask_logits", pairs.m[i], w),
                        mutable_data_in_order("theta", theta, w), w.numel()});
    }
    Device::forward_list(pairs.gate, pairs.types(), type_of(out), arrays);
    return thetas;
  }

  static std::tuple<Tensors, Tensors> backward(at::TensorList grad, at::TensorList weight, at::TensorList mask_logits,
                                               int64_t gate_id, double gate_param, std::array<bool, 2> output_mask) {
    const Pairs pairs(weight, mask_logits, gate_id, gate_param);
    const Tensors g = pairs.gradients(grad);
    const typename Device::Guard guard(weight[0]);
    Tensors dw = gradients_like(pairs.w, output_mask[0]), dm = gradients_like(pairs.m, output_mask[1]);
    std::vector<BackwardArrays> arrays;
    for (size_t i = 0; i < weight.size(); ++i) {
      const at::Tensor& w = pairs.w[i];
      arrays.push_back({data_in_order("grad", g[i], w), data_in_order("weight", w, w), data_in_order("mask_logits", pairs.m[i], w),
                        made(dw, i, w), made(dm, i, w), w.numel()});
    }
    Device::backward_list(pairs.gate, pairs.types(), type_of(g[0].scalar_type()), arrays);
    return {dw, dm};
  }

  static std::tuple<Tensors, Tensors, Tensors> double_backward(const OptionalTensors& cotangent_weight,
                                                               const OptionalTensors& cotangent_mask, at::TensorList grad,
                                                               at::TensorList weight, at::TensorList mask_logits, int64_t gate_id,
                                                               double gate_param, std::array<bool, 3> output_mask) {
    const Pairs pairs(weight, mask_logits, gate_id, gate_param);
    const Tensors g = pairs.gradients(grad);
    const typename Device::Guard guard(weight[0]);
    const Tensors a = pairs.cotangents("cotangent_weight", cotangent_weight, pairs.w),
                  b = pairs.cotangents("cotangent_mask", cotangent_mask, pairs.m);
    Tensors dg, dw = gradients_like(pairs.w, output_mask[1]), dm = gradients_like(pairs.m, output_mask[2]);
    std::vector<DoubleBackwardArrays> arrays;
    for (size_t i = 0; i < weight.size(); ++i) {
      const at::Tensor& w = pairs.w[i];
      if (output_mask[0]) dg.push_back(at::empty_like(w, w.options().dtype(g[i].scalar_type())));
      arrays.push_back({data_in_order("cotangent_weight", a[i], w), data_in_order("cotangent_mask", b[i], w),
                        data_in_order("grad", g[i], w), data_in_order("weight", w, w), data_in_order("mask_logits", pairs.m[i], w),
                        made(dg, i, w), made(dw, i, w), made(dm, i, w), w.numel()});
    }
    Device::double_backward_list(pairs.gate, pairs.types(), type_of(g[0].scalar_type()), arrays);
    return {dg, dw, dm};
  }

  static void register_in(torch::Library& library) {
    library.impl("masked_weight_list", &forward);
    library.impl("masked_weight_list_backward", &backward);
    library.impl("masked_weight_list_double_backward", &double_backward);
  }

 private:
  static std::string entry(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

  static void check_count(const char* name, size_t count, size_t wanted) {
    TORCH_CHECK_VALUE(count == wanted, "expected ", wanted, " ", name, " tensors, one per weight, got ", count);
  }

  // Each weight as one dense block of memory, and its logits in the same order.
  struct Pairs {
    Tensors w, m;
    Gate gate;

    Pairs(at::TensorList weight, at::TensorList mask_logits, int64_t gate_id, double gate_param)
        : gate{GateKind(gate_id), gate_param} {
      check_gate(gate_id, gate_param);
      TORCH_CHECK_VALUE(!weight.empty(), "weight must have at least one tensor, got none");
      check_count("mask_logits", mask_logits.size(), weight.size());
      const at::Tensor& first = weight[0];
      for (size_t i = 0; i < weight.size(); ++i) {
        const std::string name = entry("weight", i);
        check_pair(weight[i], mask_logits[i], name.c_str(), entry("mask_logits", i).c_str());
        TORCH_CHECK_TYPE(weight[i].scalar_type() == first.scalar_type(), name, " must have the dtype of weight[0], ",
                         first.scalar_type(), ", got ", weight[i].scalar_type());
        TORCH_CHECK_TYPE(mask_logits[i].scalar_type() == mask_logits[0].scalar_type(), entry("mask_logits", i),
                         " must have the dtype of mask_logits[0], ", mask_logits[0].scalar_type(), ", got ",
                         mask_logits[i].scalar_type());
        TORCH_CHECK_VALUE(weight[i].device() == first.device(), name, " must be on the device of weight[0], ", first.device(),
                          ", got ", weight[i].device());
        w.push_back(dense(weight[i]));
        m.push_back(laid_out_as(mask_logits[i], w[i]));
      }
    }

    ParamTypes types() const { return types_of(w[0], m[0]); }

    Tensors gradients(at::TensorList grad) const {
      check_count("grad", grad.size(), w.size());
      Tensors g;
      for (size_t i = 0; i < w.size(); ++i) {
        const std::string name = entry("grad", i);
        check_like(name.c_str(), grad[i], w[i]);
        TORCH_CHECK_TYPE(grad[i].scalar_type() == grad[0].scalar_type(), name, " must have the dtype of grad[0], ",
                         grad[0].scalar_type(), ", got ", grad[i].scalar_type());
        g.push_back(laid_out_as(grad[i], w[i]));
      }
      return g;
    }

    // An empty list of cotangents means zeros.
    static Tensors cotangents(const char* name, const OptionalTensors& given, const Tensors& parameters) {
      if (given.empty()) return Tensors(parameters.size());
      check_count(name, given.size(), parameters.size());
      Tensors made;
      for (size_t i = 0; i < parameters.size(); ++i) {
        made.push_back(cotangent(entry(name, i).c_str(), given.get(i), parameters[i]));
      }
      return made;
    }
  };

  static Tensors gradients_like(const Tensors& parameters, bool wanted) {
    Tensors gradients;
    for (size_t i = 0; wanted && i < parameters.size(); ++i) gradients.push_back(Device::gradient_like(parameters[i]));
    return gradients;
  }

  // Returns where to write output i; null if the list is empty, because the output is not wanted.
  static void* made(Tensors& outputs, size_t i, const at::Tensor& order) {
    return outputs.empty() ? nullptr : mutable_data_in_order("gradient", outputs[i], order);
  }
};

}  // namespace metamask
