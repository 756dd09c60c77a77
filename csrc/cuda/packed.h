// The ops on masks of one bit a weight for CUDA tensors. The arithmetic is float32 (float64 for float64 parameters), for all types
// of input and result.
#pragma once

#include <torch/library.h>

#include "cuda/kernels/packed.h"
#include "cuda/mixed_task.h"
#include "ops/packed.h"

namespace metamask::cuda {

struct CudaPacked {
  using OptionalTensor = PackedArguments::OptionalTensor;
  using OptionalList = PackedArguments::OptionalList;

  static at::Tensor pack(const at::Tensor& mask_logits, double threshold) {
    check_pack_mask(mask_logits, threshold);
    const Cuda::Guard guard(mask_logits);
    const at::Tensor logits = mask_logits.contiguous();
    at::Tensor packed = at::empty(packed_shape(logits.sizes()), logits.options().dtype(at::kByte));
    pack_mask(type_of(logits.scalar_type()), data("mask_logits", logits), threshold, mutable_data<uint8_t>("packed", packed),
              packed_rows(logits.sizes()), packed_columns(logits.sizes()), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return packed;
  }

  static at::Tensor unpack(const at::Tensor& packed, at::IntArrayRef shape) {
    check_unpack_mask(packed, shape);
    const Cuda::Guard guard(packed);
    const at::Tensor bits = packed.contiguous();
    at::Tensor mask = at::empty(shape, packed.options().dtype(at::kBool));
    unpack_mask(data<uint8_t>("packed", bits), mutable_data<bool>("mask", mask), packed_rows(shape), packed_columns(shape),
                c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return mask;
  }

  static at::Tensor linear(const at::Tensor& input, const at::Tensor& slots, const at::Tensor& weight, at::TensorList packed_list,
                           const OptionalTensor& bias, const OptionalList& packed_bias_list, int64_t groups,
                           std::optional<at::ScalarType> dtype) {
    const PackedArguments arguments(input, slots, weight, packed_list, bias, packed_bias_list, groups);
    const at::ScalarType out_type = dtype.value_or(weight.scalar_type());
    check_storage("dtype", out_type, weight);
    const Cuda::Guard guard(weight);
    const NoAutocast no_autocast;
    const PackedCase given = case_of(input, weight, arguments.packed, groups);
    const at::Tensor x = matrix(input.to(out_type), compute_type(weight)), w = weight.contiguous(), s = slots.contiguous();
    const at::Tensor b = is_given(bias) ? bias->to(x.scalar_type()).contiguous() : at::Tensor();
    const Bits bits(arguments.packed, weight), bias_bits(arguments.packed_bias, weight);
    at::Tensor y = at::empty({given.rows(), given.out}, x.options());
    at::Tensor workspace = bytes(packed_masked_linear_workspace(given), x);
    packed_masked_linear(given, data<int64_t>("slots", s), data("weight", w), bits.pointers, data("bias", b), bias_bits.pointers,
                         data("input", x), mutable_data("y", y), mutable_data("workspace", workspace),
                         c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return y.view(with_last(input, given.out)).to(out_type);
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& input,
                                                                 const at::Tensor& slots, const at::Tensor& weight,
                                                                 at::TensorList packed_list, const OptionalTensor& bias,
                                                                 const OptionalList& packed_bias_list, int64_t groups,
                                                                 std::array<bool, 3> output_mask) {
    const PackedArguments arguments(input, slots, weight, packed_list, bias, packed_bias_list, groups);
    check_batch_grad(grad, input, weight);
    const Cuda::Guard guard(weight);
    const NoAutocast no_autocast;
    const PackedCase given = case_of(input, weight, arguments.packed, groups);
    const at::Tensor dy = matrix(grad, compute_type(weight)), w = weight.contiguous(), s = slots.contiguous();
    const int64_t* const slot = data<int64_t>("slots", s);
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    const Bits bits(arguments.packed, weight), bias_bits(arguments.packed_bias, weight);
    at::Tensor dx, dw, db;
    if (output_mask[0]) {
      dx = at::empty({given.rows(), groups * given.in}, dy.options());
      at::Tensor workspace = bytes(packed_input_gradient_workspace(given), dy);
      packed_input_gradient(given, slot, data("weight", w), bits.pointers, data("grad", dy), mutable_data("gradient of input", dx),
                            mutable_data("workspace", workspace), stream);
      dx = dx.view(input.sizes()).to(input.scalar_type());
    }
    if (output_mask[1]) {
      const at::Tensor x = matrix(input.to(grad.scalar_type()), compute_type(weight));
      dw = at::empty_like(w);
      packed_weight_gradient(given, slot, bits.pointers, data("grad", dy), data("input", x), mutable_data("gradient of weight", dw),
                             stream);
    }
    if (output_mask[2] && is_given(bias) && !arguments.packed_bias.has_value()) db = dy.sum(0).to(bias->scalar_type());
    if (output_mask[2] && is_given(bias) && arguments.packed_bias.has_value()) {
      // The bias is one row of weights, [1, out], which dy meets: its own gradient is a one for each row.
      const PackedCase row{given.param, given.samples, given.rows_per_sample, 1, 1, given.out, given.tasks};
      const at::Tensor ones = at::ones({given.rows()}, dy.options());
      db = at::empty(bias->sizes(), bias->options());
      packed_weight_gradient(row, slot, bias_bits.pointers, data("ones", ones), data("grad", dy),
                             mutable_data("gradient of bias", db), stream);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return {dx, dw, db};
  }

  static at::Tensor superposition_gradient(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
                                           at::TensorList packed_list, int64_t groups) {
    check_packed_weight(weight, groups);
    check_batch_input(input, weight, groups);
    const PackedMasks packed = packed_weight_masks(packed_list, weight);
    check_superposition(grad, input, weight, packed);
    const Cuda::Guard guard(weight);
    const NoAutocast no_autocast;
    if (weight.numel() == 0) return at::zeros({input.size(0), packed.tasks()}, grad.options());
    const PackedCase given = case_of(input, weight, packed, groups);
    const at::Tensor dy = matrix(grad, compute_type(weight)), x = matrix(input, compute_type(weight)), w = weight.contiguous();
    const Bits bits(packed, weight);
    at::Tensor result = at::empty({given.samples, given.tasks}, dy.options());
    at::Tensor workspace = bytes(packed_superposition_workspace(given), dy);
    packed_superposition_gradient(given, data("weight", w), bits.pointers, data("grad", dy), data("input", x),
                                  mutable_data("result", result), mutable_data("workspace", workspace),
                                  c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return result.to(grad.scalar_type());
  }

  static void register_in(torch::Library& library) {
    library.impl("pack_mask", &pack);
    library.impl("unpack_mask", &unpack);
    library.impl("packed_masked_linear", &linear);
    library.impl("packed_masked_linear_backward", &backward);
    library.impl("packed_superposition_gradient", &superposition_gradient);
  }

 private:
  // Masks in the form that kernels take, and the tensors that keep them alive.
  struct Bits {
    TaskArrays arrays;
    at::Tensor table;
    PerTask pointers;

    Bits(const std::optional<PackedMasks>& masks, const at::Tensor& on) {
      if (!masks.has_value()) return;
      arrays.stacked = masks->stacked();
      arrays.tasks = masks->tasks();
      for (const at::Tensor& tensor : masks->tensors()) arrays.tensors.push_back(tensor.contiguous());
      if (arrays.stacked) arrays.bytes = arrays.tensors[0].stride(0);
      pointers = per_task(arrays, on, table);
    }
  };

  static PackedCase case_of(const at::Tensor& input, const at::Tensor& weight, const PackedMasks& packed, int64_t groups) {
    return {type_of(weight.scalar_type()),
            input.size(0),
            rows_per_sample(input),
            groups,
            weight.size(0),
            weight.size(1),
            packed.tasks()};
  }
};

}  // namespace metamask::cuda
