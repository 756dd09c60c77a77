// task_masked_linear with derivatives of every order.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

namespace metamask {

// Calls the op, and lets autograd record it. Not for transforms of torch.func and forward-mode AD, which know no node of C++.
at::Tensor differentiable_task_masked_linear(const at::Tensor& input, const at::Tensor& slots, const at::Tensor& weight,
                                             const std::vector<at::Tensor>& masks, const std::optional<at::Tensor>& bias,
                                             const std::vector<at::Tensor>& bias_masks, int64_t gate_id, double gate_param,
                                             int64_t groups, std::optional<at::ScalarType> dtype);

}  // namespace metamask
