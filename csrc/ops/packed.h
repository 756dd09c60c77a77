// Argument checks of the ops on bit-packed masks, worded as those in Python, and the masks in the form that the ops take.
#pragma once

#include <algorithm>
#include <vector>

#include "ops/checks.h"

namespace metamask {

inline int64_t packed_bytes(int64_t bits) { return (bits + 7) / 8; }

// The tasks' masks of one bit a weight: one tensor with a dimension of tasks in front, or a list of one tensor a task. `task` is
// the shape of one mask.
class PackedMasks {
 public:
  PackedMasks(const char* name, at::TensorList tensors, std::vector<int64_t> task, const char* task_words, const at::Tensor& weight)
      : tensors_(tensors), stacked_(tensors.size() == 1 && tensors[0].dim() == int64_t(task.size()) + 1) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const at::Tensor& tensor = tensors[i];
      const std::string which = stacked_ ? std::string(name) : std::string(name) + "[" + std::to_string(i) + "]";
      TORCH_CHECK_TYPE(tensor.scalar_type() == at::kByte, which, " must be uint8, as pack_mask gives it, got ",
                       tensor.scalar_type());
      const at::IntArrayRef sizes = stacked_ ? tensor.sizes().slice(1) : tensor.sizes();
      TORCH_CHECK_VALUE(sizes == at::IntArrayRef(task), which, " must be ", stacked_ ? "[tasks, " : "[", task_words,
                        "], a task's being ", at::IntArrayRef(task), ", got ", tensor.sizes());
      if (stacked_) {
        check_sizes(name, tensor.sizes());
        check_tasks(name, tensor.size(0));
      }
      TORCH_CHECK_VALUE(tensor.device() == weight.device(), which, " must be on the device of weight, ", weight.device(), ", got ",
                        tensor.device());
    }
  }

  bool stacked() const { return stacked_; }
  at::TensorList tensors() const { return tensors_; }
  int64_t tasks() const { return stacked_ ? tensors_[0].size(0) : int64_t(tensors_.size()); }

  // Returns a task's mask. If it is not contiguous, returns a copy, which `copies` keeps alive. A contiguous one gets no tensor of
  // its own: making tensors for 16 tasks takes as long as the arithmetic of a small layer.
  const uint8_t* bits(int64_t slot, std::vector<at::Tensor>& copies) const {
    const at::Tensor& tensor = tensors_[stacked_ ? 0 : slot];
    if (tensor.is_contiguous()) return data<uint8_t>("packed", tensor) + (stacked_ ? slot * tensor.stride(0) : 0);
    return data<uint8_t>("packed", copies.emplace_back((stacked_ ? tensor.select(0, slot) : tensor).contiguous()));
  }

 private:
  at::TensorList tensors_;
  bool stacked_;
};

inline PackedMasks packed_weight_masks(at::TensorList packed, const at::Tensor& weight) {
  return PackedMasks("packed", packed, {weight.size(0), packed_bytes(weight.size(1))}, "out, ceil(in / 8)", weight);
}

inline PackedMasks packed_bias_masks(at::TensorList packed, const at::Tensor& weight) {
  return PackedMasks("packed_bias", packed, {packed_bytes(weight.size(0))}, "ceil(out / 8)", weight);
}

inline void check_packed_weight(const at::Tensor& weight, int64_t groups) {
  check_masked_type("weight", weight);
  check_sizes("weight", weight.sizes());
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must be [out, in], got shape ", weight.sizes());
  TORCH_CHECK_VALUE(groups >= 1 && weight.size(0) % groups == 0, "groups must be at least 1 and divide out = ", weight.size(0),
                    ", got ", groups);
}

inline void check_packed_bias(const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                              const std::optional<PackedMasks>& packed_bias, int64_t tasks) {
  TORCH_CHECK_VALUE(is_given(bias) || !packed_bias.has_value(), "packed_bias needs a bias, got bias=None");
  if (!is_given(bias)) return;
  check_bias(weight, *bias);
  TORCH_CHECK_VALUE(!packed_bias.has_value() || packed_bias->tasks() == tasks, "packed_bias must have the tasks of packed, ", tasks,
                    ", got ", packed_bias.has_value() ? packed_bias->tasks() : 0);
}

// The arguments that forward and backward of packed_masked_linear share, checked except for the values of slots.
struct PackedArguments {
  using OptionalTensor = std::optional<at::Tensor>;
  using OptionalList = std::optional<std::vector<at::Tensor>>;

  PackedMasks packed;
  std::optional<PackedMasks> packed_bias;

  PackedArguments(const at::Tensor& input, const at::Tensor& slots, const at::Tensor& weight, at::TensorList packed_list,
                  const OptionalTensor& bias, const OptionalList& packed_bias_list, int64_t groups)
      : packed((check_packed_weight(weight, groups), check_batch_input(input, weight, groups),
                packed_weight_masks(packed_list, weight))) {
    if (packed_bias_list.has_value()) packed_bias.emplace(packed_bias_masks(*packed_bias_list, weight));
    check_slots(slots, input, weight);
    TORCH_CHECK_VALUE(packed.tasks() > 0 || slots.numel() == 0, "packed must hold at least one task, got none");
    check_packed_bias(weight, bias, packed_bias, packed.tasks());
  }
};

inline void check_superposition(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
                                const PackedMasks& packed) {
  check_batch_grad(grad, input, weight);
  check_sizes("the result", {input.size(0), packed.tasks()});
}

// Rows and columns of a packed mask: a vector is one row; otherwise each index of the first dimension is a row.
inline int64_t packed_rows(at::IntArrayRef shape) { return shape.size() == 1 ? 1 : shape[0]; }
inline int64_t packed_columns(at::IntArrayRef shape) { return c10::multiply_integers(shape.size() == 1 ? shape : shape.slice(1)); }
inline std::vector<int64_t> packed_shape(at::IntArrayRef shape) {
  if (shape.size() == 1) return {packed_bytes(shape[0])};
  return {shape[0], packed_bytes(packed_columns(shape))};
}

inline void check_pack_mask(const at::Tensor& mask_logits, double threshold) {
  check_masked_type("mask_logits", mask_logits);
  TORCH_CHECK_VALUE(mask_logits.dim() > 0, "mask_logits must be [out, ...] or [n], got a scalar");
  check_sizes("mask_logits", mask_logits.sizes());
  TORCH_CHECK_VALUE(threshold == threshold, "threshold must be a number, got nan");
}

inline void check_unpack_mask(const at::Tensor& packed, at::IntArrayRef shape) {
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kByte, "packed must be uint8, as pack_mask gives it, got ", packed.scalar_type());
  TORCH_CHECK_VALUE(!shape.empty() && std::all_of(shape.begin(), shape.end(), [](int64_t n) { return n >= 0; }),
                    "shape must be [out, ...] or [n], got ", shape);
  check_sizes("shape", shape);
  TORCH_CHECK_VALUE(packed.sizes() == at::IntArrayRef(packed_shape(shape)), "packed must be ", at::IntArrayRef(packed_shape(shape)),
                    " for the shape ", shape, ", got ", packed.sizes());
}

}  // namespace metamask
