// task_masked_linear for CUDA tensors: the Device of ops/task_masked_linear.h. The host never waits for the device: kernels sort
// the rows and check the slots.
#pragma once

#include "cuda/kernels/task_masked_linear.h"
#include "cuda/mixed_task.h"

namespace metamask::cuda {

// The arguments of one op in the form that the launchers take, for products of type `product`.
struct TaskCall {
  const TaskArguments& given;
  at::Tensor rows, used, masks_table, bias_masks_table;
  TaskLinearCase kernel;
  TaskParameters parameters;
  cudaStream_t stream = c10::cuda::getCurrentCUDAStream();

  TaskCall(const TaskArguments& arguments, at::ScalarType product) : given(arguments) {
    const int64_t samples = given.slots.numel(), tasks = given.masks.tasks, count = samples * given.rows_per_sample;
    const at::TensorOptions longs = given.weight.options().dtype(at::kLong);
    rows = at::empty({3, count}, longs);
    used = at::zeros({tasks}, longs);
    int64_t* const memory = mutable_data<int64_t>("rows", rows);
    const SortedRows sorted{samples, given.rows_per_sample, tasks, memory, memory + count, memory + 2 * count};
    const bool tf32 = product == at::kFloat && float32_as_tf32();
    const ParamTypes types{type_of(given.weight.scalar_type()), given.masks.type};
    kernel = {given.gate,           types, given.bias_masks.type, type_of(product), tf32, given.groups, given.weight.size(0),
              given.weight.size(1), sorted};
    parameters = {data("weight", given.weight), per_task(given.masks, given.weight, masks_table), data("bias", given.bias),
                  per_task(given.bias_masks, given.weight, bias_masks_table)};
    sort_by_task(data<int64_t>("slots", given.slots), sorted, mutable_data<int64_t>("used", used), stream);
  }

  // The bias as a weight [out, 1], whose input is a column of ones.
  TaskLinearCase bias_kernel() const {
    TaskLinearCase made = kernel;
    made.in = made.groups = 1;
    made.tf32 = false;
    made.types.mask = given.bias_masks.type;
    return made;
  }
  TaskParameters bias_parameters() const { return {parameters.bias, parameters.bias_masks}; }

  // Returns uninitialised gradients in the form of `like`, with zeros for the tasks that the batch does not have.
  TaskArrays gradients_like(const TaskArrays& like, PerTask& pointers, at::Tensor& table) const {
    TaskArrays made{{}, like.stacked, like.tasks, like.bytes, like.type};
    for (const at::Tensor& mask : like.tensors) made.tensors.push_back(at::empty_like(mask, at::MemoryFormat::Contiguous));
    if (!made.given()) return made;
    pointers = per_task(made, given.weight, table);
    clear_unused(like.type, pointers, like.tasks, data<int64_t>("used", used), like.bytes / bytes_of(like.type), stream);
    return made;
  }
};

struct CudaTaskLinear : Cuda {
  static at::Tensor task_linear(const TaskArguments& arguments, const at::Tensor& input) {
    if (!has_task_kernel(type_of(arguments.weight.scalar_type()), type_of(input.scalar_type()))) {
      return task_linear(widened(arguments), input.to(at::kFloat)).to(input.scalar_type());
    }
    const TaskCall call(arguments, input.scalar_type());
    at::Tensor y = at::empty({input.size(0), call.kernel.out}, input.options());
    at::Tensor workspace = bytes(task_masked_linear_workspace(call.kernel), input);
    task_masked_linear(call.kernel, call.parameters, data("input", input), mutable_data("y", y),
                       mutable_data("workspace", workspace), call.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return y;
  }

  static TaskGradients task_linear_backward(const TaskArguments& arguments, const at::Tensor& dy, const at::Tensor& x,
                                            std::array<bool, 5> output_mask) {
    if (!has_task_kernel(type_of(arguments.weight.scalar_type()), type_of(dy.scalar_type()))) {
      TaskGradients made = task_linear_backward(widened(arguments), dy.to(at::kFloat), x.to(at::kFloat), output_mask);
      return narrowed(made, arguments);
    }
    const TaskCall call(arguments, dy.scalar_type());
    TaskGradients made;
    at::Tensor dw = shared_gradient(arguments.weight, x, output_mask[1]), dm_table;
    PerTask dm;
    if (output_mask[2]) made.masks = call.gradients_like(arguments.masks, dm, dm_table);
    if (output_mask[0]) made.input = gradient_of_rows(x);
    at::Tensor workspace = bytes(task_masked_linear_backward_workspace(call.kernel, output_mask[0]), x);
    if (output_mask[0] || output_mask[1] || output_mask[2]) {
      task_masked_linear_backward(call.kernel, call.parameters, data("grad", dy), data("input", x),
                                  mutable_data("gradient of weight", dw), dm, mutable_data("gradient of input", made.input),
                                  mutable_data("workspace", workspace), call.stream);
    }
    if (output_mask[1]) made.weight = dw.to(arguments.weight.scalar_type());
    const at::Tensor& bias = arguments.bias;
    if (bias.defined() && !arguments.bias_masks.given()) {
      if (output_mask[3]) made.bias = dy.sum(0, false, compute_type(bias)).to(bias.scalar_type());
    } else if (bias.defined() && (output_mask[3] || output_mask[4])) {
      const at::Tensor ones = at::ones({dy.size(0), 1}, dy.options());
      at::Tensor db = shared_gradient(bias, ones, output_mask[3]), dbm_table;
      PerTask dbm;
      if (output_mask[4]) made.bias_masks = call.gradients_like(arguments.bias_masks, dbm, dbm_table);
      task_masked_linear_backward(call.bias_kernel(), call.bias_parameters(), data("grad", dy), data("ones", ones),
                                  mutable_data("gradient of bias", db), dbm, nullptr, nullptr, call.stream);
      if (output_mask[3]) made.bias = db.to(bias.scalar_type());
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return made;
  }

  static std::pair<at::Tensor, TaskGradients> task_linear_double_backward(const TaskArguments& arguments,
                                                                          const TaskGradients& cotangents, const at::Tensor& dy,
                                                                          const at::Tensor& x, std::array<bool, 6> output_mask) {
    if (compute_type(arguments.weight) != arguments.weight.scalar_type() || compute_type(dy) != dy.scalar_type()) {
      auto [ddy, made] =
          task_linear_double_backward(widened(arguments), widened(cotangents), dy.to(at::kFloat), x.to(at::kFloat), output_mask);
      return {ddy, narrowed(made, arguments)};
    }
    TaskCall call(arguments, x.scalar_type());
    call.kernel.tf32 = false;
    at::Tensor a_table, a_bias_table;
    const TaskCotangents along{data("cotangent_input", cotangents.input), data("cotangent_weight", cotangents.weight),
                               per_task(cotangents.masks, arguments.weight, a_table)};
    const TaskCotangents along_bias{nullptr, data("cotangent_bias", cotangents.bias),
                                    per_task(cotangents.bias_masks, arguments.weight, a_bias_table)};
    const bool masked_bias = arguments.bias_masks.given();
    const at::Tensor ones = at::ones({dy.size(0), 1}, dy.options());
    TaskParameters parameters = call.parameters;
    parameters.bias = nullptr;
    // Without cotangents of the parameters' gradients x meets only zeros.
    const void* const met = cotangents.weight.defined() || cotangents.masks.given() ? data("input", x) : nullptr;

    at::Tensor ddy;
    if (output_mask[0]) {
      ddy = gradient_of_rows(dy);
      at::Tensor workspace = bytes(task_masked_linear_workspace(call.kernel), x);
      task_masked_linear_double_forward(call.kernel, parameters, along, met, mutable_data("gradient of grad", ddy),
                                        mutable_data("workspace", workspace), call.stream);
      if (masked_bias) {
        at::Tensor of_bias = gradient_of_rows(dy);
        task_masked_linear_double_forward(call.bias_kernel(), call.bias_parameters(), along_bias, data("ones", ones),
                                          mutable_data("gradient of grad", of_bias), nullptr, call.stream);
        ddy.add_(of_bias);
      } else if (cotangents.bias.defined()) {
        ddy.add_(cotangents.bias);
      }
    }
    TaskGradients made;
    at::Tensor dw = shared_gradient(arguments.weight, x, output_mask[2]), dm_table;
    PerTask dm;
    if (output_mask[3]) made.masks = call.gradients_like(arguments.masks, dm, dm_table);
    if (output_mask[1]) made.input = gradient_of_rows(x);
    if (output_mask[1] || output_mask[2] || output_mask[3]) {
      at::Tensor workspace = bytes(task_masked_linear_backward_workspace(call.kernel, output_mask[1]), x);
      task_masked_linear_double_backward(call.kernel, parameters, along, data("grad", dy), met,
                                         mutable_data("gradient of weight", dw), dm, mutable_data("gradient of input", made.input),
                                         mutable_data("workspace", workspace), call.stream);
    }
    made.weight = dw;
    const at::Tensor& bias = arguments.bias;
    if (bias.defined() && !masked_bias) {
      if (output_mask[4]) made.bias = at::zeros_like(bias);  // its gradient is dy's sum, whatever it is
    } else if (bias.defined() && (output_mask[4] || output_mask[5])) {
      at::Tensor dbm_table;
      PerTask dbm;
      made.bias = shared_gradient(bias, ones, output_mask[4]);
      if (output_mask[5]) made.bias_masks = call.gradients_like(arguments.bias_masks, dbm, dbm_table);
      task_masked_linear_double_backward(call.bias_kernel(), call.bias_parameters(), along_bias, data("grad", dy),
                                         data("ones", ones), mutable_data("gradient of bias", made.bias), dbm, nullptr, nullptr,
                                         call.stream);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return {ddy, made};
  }

 private:
  // Allocates the gradient of a parameter that all tasks share, from the rows of `x`, in the type of the arithmetic.
  static at::Tensor shared_gradient(const at::Tensor& parameter, const at::Tensor& x, bool wanted) {
    if (!wanted) return at::Tensor();
    const at::TensorOptions options = parameter.options().dtype(compute_type(parameter));
    // Without rows no kernel runs.
    return x.size(0) == 0 ? at::zeros(parameter.sizes(), options) : at::empty(parameter.sizes(), options);
  }

  static at::Tensor gradient_of_rows(const at::Tensor& rows) { return at::empty_like(rows); }

  static at::Tensor widened(const at::Tensor& tensor) { return tensor.defined() ? tensor.to(at::kFloat) : tensor; }

  static TaskArrays widened(const TaskArrays& arrays) {
    const int64_t bytes = arrays.bytes / bytes_of(arrays.type) * bytes_of(Type::kFloat32);
    TaskArrays made{{}, arrays.stacked, arrays.tasks, bytes, Type::kFloat32};
    for (const at::Tensor& tensor : arrays.tensors) {
      made.tensors.push_back(tensor.defined() ? tensor.to(at::kFloat, false, false, at::MemoryFormat::Contiguous) : tensor);
    }
    return made;
  }

  // Widens parameters of 16 bits for the kernels of float32.
  static TaskArguments widened(const TaskArguments& given) {
    return {given.slots, widened(given.weight), widened(given.bias),  widened(given.masks), widened(given.bias_masks),
            given.gate,  given.groups,          given.rows_per_sample};
  }
  static TaskGradients widened(const TaskGradients& given) {
    return {widened(given.input), widened(given.weight), widened(given.masks), widened(given.bias), widened(given.bias_masks)};
  }

  static void narrow(TaskArrays& gradients, const TaskArrays& to) {
    for (size_t i = 0; i < gradients.tensors.size(); ++i) {
      gradients.tensors[i] = gradients.tensors[i].to(to.tensors[i].scalar_type());
    }
  }

  static TaskGradients narrowed(TaskGradients made, const TaskArguments& to) {
    const at::ScalarType type = to.weight.scalar_type();
    if (made.weight.defined()) made.weight = made.weight.to(type);
    if (made.bias.defined()) made.bias = made.bias.to(type);
    narrow(made.masks, to.masks);
    narrow(made.bias_masks, to.bias_masks);
    return made;
  }
};

}  // namespace metamask::cuda
