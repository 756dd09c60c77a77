// The nodes of autograd for task_masked_linear, closed under differentiation: Forward -> Backward -> DoubleBackward -> plain torch.
// A Function of Python costs a small layer more than its arithmetic, and MAML runs six of them a layer and step. Unlike one, a node
// of C++ knows which gradients the backward that runs asks for, and computes no others.
//
// What is rare is plain torch, in metamask_ext/ops/mixed_task/autograd.py: the derivative of DoubleBackward, and every backward of
// a batch of gradients at once (is_grads_batched).
#include "autograd/task_masked_linear.h"

#include <ATen/LegacyBatchedTensorImpl.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <tuple>

namespace metamask {
namespace {

using at::Tensor, at::TensorList;
using torch::autograd::AutogradContext, torch::autograd::Function;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

// The arguments that are no tensors; `masks` counts the weight's masks, which the bias's follow.
struct Call {
  int64_t gate_id = 0, groups = 1, masks = 0;
  double gate_param = 0;
};

// The tensors of a call; an absent bias is undefined.
struct Arguments {
  Tensor input, slots, weight, bias;
  Tensors masks, bias_masks;
};

// Which of input, weight, masks, bias and bias masks have a gradient; its bits are an integer among the arguments of a node.
using Wanted = std::array<bool, 5>;

int64_t bits_of(const bool* flags, int64_t size) {
  int64_t bits = 0;
  for (int64_t i = 0; i < size; ++i) bits |= int64_t(flags[i]) << i;
  return bits;
}

template <size_t kSize>
std::array<bool, kSize> flags_of(int64_t bits) {
  std::array<bool, kSize> flags;
  for (size_t i = 0; i < kSize; ++i) flags[i] = bits >> i & 1;
  return flags;
}

OptionalTensor optional(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

// --- The ops themselves, below autograd.

using Gradients = std::tuple<Tensor, Tensor, Tensors, Tensor, Tensors>;
using SecondGradients = std::tuple<Tensor, Tensor, Tensor, Tensors, Tensor, Tensors>;
using OptionalTensors = c10::List<OptionalTensor>;

template <class Schema>
c10::TypedOperatorHandle<Schema> op_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
}

Tensor raw_forward(const Call& call, const Arguments& given, std::optional<at::ScalarType> dtype) {
  static const auto op = op_named<Tensor(const Tensor&, const Tensor&, const Tensor&, TensorList, const OptionalTensor&, TensorList,
                                         int64_t, double, int64_t, std::optional<at::ScalarType>)>("metamask::task_masked_linear");
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(given.input, given.slots, given.weight, given.masks, optional(given.bias), given.bias_masks, call.gate_id,
                 call.gate_param, call.groups, dtype);
}

Gradients raw_backward(const Call& call, const Tensor& grad, const Arguments& given, const Wanted& wanted) {
  static const auto op =
      op_named<Gradients(const Tensor&, const Tensor&, const Tensor&, const Tensor&, TensorList, const OptionalTensor&, TensorList,
                         int64_t, double, int64_t, std::array<bool, 5>)>("metamask::task_masked_linear_backward");
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(grad, given.input, given.slots, given.weight, given.masks, optional(given.bias), given.bias_masks, call.gate_id,
                 call.gate_param, call.groups, wanted);
}

OptionalTensors optional_list(const Tensors& tensors) {
  OptionalTensors list;
  const auto defined = [](const Tensor& tensor) { return tensor.defined(); };
  if (std::none_of(tensors.begin(), tensors.end(), defined)) return list;
  for (const Tensor& tensor : tensors) list.push_back(optional(tensor));
  return list;
}

// Cotangents of the gradients; undefined: zero.
struct Cotangents {
  Tensor input, weight, bias;
  Tensors masks, bias_masks;
};

SecondGradients raw_double_backward(const Call& call, const Cotangents& cotangents, const Tensor& grad, const Arguments& given,
                                    const std::array<bool, 6>& wanted) {
  static const auto op =
      op_named<SecondGradients(const OptionalTensor&, const OptionalTensor&, const OptionalTensors&, const OptionalTensor&,
                               const OptionalTensors&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, TensorList,
                               const OptionalTensor&, TensorList, int64_t, double, int64_t, std::array<bool, 6>)>(
          "metamask::task_masked_linear_double_backward");
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(optional(cotangents.input), optional(cotangents.weight), optional_list(cotangents.masks),
                 optional(cotangents.bias), optional_list(cotangents.bias_masks), grad, given.input, given.slots, given.weight,
                 given.masks, optional(given.bias), given.bias_masks, call.gate_id, call.gate_param, call.groups, wanted);
}

// --- Plain torch in Python, by the names of metamask_ext.ops.mixed_task.autograd.

namespace py = pybind11;

py::list listed(const Tensors& tensors) {
  py::list list;
  for (const Tensor& tensor : tensors) list.append(tensor.defined() ? py::cast(tensor) : py::object(py::none()));
  return list;
}

template <class... Lists>
Tensors plain(const char* name, const Call& call, int64_t wanted, const Lists&... lists) {
  const py::gil_scoped_acquire acquired;
  const py::object function = py::module_::import("metamask_ext.ops.mixed_task.autograd").attr(name);
  const py::tuple its = py::make_tuple(call.gate_id, call.gate_param, call.groups, call.masks);
  Tensors found;
  for (const py::handle one : function(its, wanted, listed(lists)...)) {
    found.push_back(one.is_none() ? Tensor() : one.cast<Tensor>());
  }
  return found;
}

Tensors in_a_row(std::initializer_list<Tensor> first, const Arguments& given) {
  Tensors all(first);
  all.insert(all.end(), {given.input, given.slots, given.weight, given.bias});
  all.insert(all.end(), given.masks.begin(), given.masks.end());
  all.insert(all.end(), given.bias_masks.begin(), given.bias_masks.end());
  return all;
}

void append(Tensors& to, const Tensors& some, size_t count) {
  to.insert(to.end(), some.begin(), some.end());
  if (some.empty()) to.insert(to.end(), count, Tensor());
}

Tensors in_a_row(const Cotangents& cotangents, const Tensor& grad, const Arguments& given) {
  Tensors row{cotangents.input, cotangents.weight, cotangents.bias};
  append(row, cotangents.masks, given.masks.size());
  append(row, cotangents.bias_masks, given.bias_masks.size());
  const Tensors rest = in_a_row({grad}, given);
  row.insert(row.end(), rest.begin(), rest.end());
  return row;
}

// --- What a node keeps.

void keep(AutogradContext* ctx, const Call& call, Tensors tensors) {
  ctx->save_for_backward(std::move(tensors));
  ctx->saved_data["numbers"] = std::vector<int64_t>{call.gate_id, call.groups, call.masks};
  ctx->saved_data["gate_param"] = call.gate_param;
}

Call call_of(AutogradContext* ctx) {
  const auto numbers = ctx->saved_data.at("numbers").toIntVector();
  return {numbers[0], numbers[1], numbers[2], ctx->saved_data.at("gate_param").toDouble()};
}

// Takes the tensors that in_a_row() made, after `skipped` others.
Arguments arguments_of(const Tensors& row, size_t skipped, const Call& call) {
  const auto masks = row.begin() + skipped + 4;
  return {row[skipped],
          row[skipped + 1],
          row[skipped + 2],
          row[skipped + 3],
          {masks, masks + call.masks},
          {masks + call.masks, row.end()}};
}

// Tells which gradients are asked for, of tensors whose edges begin with that numbered `edge`.
Wanted wanted_of(AutogradContext* ctx, int64_t edge, const Arguments& given) {
  const auto any = [&](int64_t begin, size_t count) {
    for (int64_t i = begin; i < begin + int64_t(count); ++i) {
      if (ctx->needs_input_grad(i)) return true;
    }
    return false;
  };
  const bool has_bias = given.bias.defined();
  const int64_t masks = edge + 3 + has_bias;
  return {ctx->needs_input_grad(edge), ctx->needs_input_grad(edge + 2), any(masks, given.masks.size()),
          has_bias && ctx->needs_input_grad(edge + 3), any(masks + int64_t(given.masks.size()), given.bias_masks.size())};
}

// Puts gradients into the places of the arguments of apply(): nothing for the `numbers` ones that are no tensors, then `first`, and
// those of input, slots, weight, bias and masks.
Tensors placed(size_t numbers, std::initializer_list<Tensor> first, const Tensor& dx, const Tensor& dw, const Tensor& db,
               const Tensors& dmasks, const Tensors& dbias_masks, const Arguments& given) {
  Tensors made(numbers);
  made.insert(made.end(), first);
  made.insert(made.end(), {dx, Tensor(), dw, db});
  append(made, dmasks, given.masks.size());
  append(made, dbias_masks, given.bias_masks.size());
  return made;
}

bool is_batched(const Tensors& tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const Tensor& tensor) { return tensor.defined() && at::isBatchedTensor(tensor); });
}

// Splits a list of gradients in the order input, weight, bias, masks, bias masks, which starts at `first`.
Gradients split(const Tensors& found, size_t first, const Call& call) {
  const auto masks = found.begin() + first + 3, bias_masks = masks + call.masks;
  return {found[first], found[first + 1], {masks, bias_masks}, found[first + 2], {bias_masks, found.end()}};
}

TensorList all_masks(const Arguments& given, Tensors& both) {
  both = given.masks;
  both.insert(both.end(), given.bias_masks.begin(), given.bias_masks.end());
  return both;
}

Arguments arguments_of(const Tensor& input, const Tensor& slots, const Tensor& weight, const OptionalTensor& bias, TensorList masks,
                       const Call& call) {
  const auto first = masks.begin() + call.masks;
  return {input, slots, weight, bias.value_or(Tensor()), {masks.begin(), first}, {first, masks.end()}};
}

// What of a list of defined tensors stands for: the parts of `whole` that `present` has.
Tensors compact(const Gradients& whole, const Wanted& present) {
  const auto& [dx, dw, dmasks, db, dbias_masks] = whole;
  Tensors made;
  if (present[0]) made.push_back(dx);
  if (present[1]) made.push_back(dw);
  if (present[3]) made.push_back(db);
  if (present[2]) made.insert(made.end(), dmasks.begin(), dmasks.end());
  if (present[4]) made.insert(made.end(), dbias_masks.begin(), dbias_masks.end());
  return made;
}

Cotangents expanded(const Tensors& given, const Wanted& present, const Call& call) {
  size_t next = 0;
  Cotangents made;
  if (present[0]) made.input = given[next++];
  if (present[1]) made.weight = given[next++];
  if (present[3]) made.bias = given[next++];
  const auto masks = given.begin() + next, bias_masks = masks + (present[2] ? call.masks : 0);
  made.masks.assign(masks, bias_masks);
  if (present[4]) made.bias_masks.assign(bias_masks, given.end());
  return made;
}

// The list of a DoubleBackward, taken apart.
struct Row {
  Cotangents cotangents;
  Tensor grad;
  Arguments given;
};

Row taken_apart(const Tensors& row, const Call& call, size_t bias_masks, const Wanted& present) {
  const size_t count = size_t(present[0]) + present[1] + present[3] + (present[2] ? call.masks : 0) + (present[4] ? bias_masks : 0);
  Row made{expanded(Tensors(row.begin(), row.begin() + count), present, call), row[count], {}};
  Tensors rest(row.begin() + count + 1, row.end());
  if (rest.size() == 3 + call.masks + bias_masks) rest.insert(rest.begin() + 3, Tensor());  // there is no bias
  made.given = arguments_of(rest, 0, call);
  return made;
}

}  // namespace
}  // namespace metamask

// --- The nodes. Their names, as a profiler shows them, are not those of ops: no "metamask::" in front.
namespace task_masked_linear {

using namespace metamask;  // NOLINT(google-build-using-namespace)

// Gives ddy, dx, dw, db and those of the masks, of which only what `wanted` has; `row` are the cotangents, all defined, of what
// `present` has of input, weight, masks, bias and bias masks, then grad and the arguments.
struct DoubleBackward : Function<DoubleBackward> {
  static Tensors forward(AutogradContext* ctx, const Call& call, int64_t bias_masks, int64_t present, int64_t wanted,
                         TensorList row);
  static Tensors backward(AutogradContext* ctx, const Tensors& cotangents);
};

// Gives those of dx, dw, db and the masks' gradients that `wanted` has.
struct Backward : Function<Backward> {
  static Tensors forward(AutogradContext* ctx, const Call& call, int64_t wanted, const Tensor& grad, const Tensor& input,
                         const Tensor& slots, const Tensor& weight, const OptionalTensor& bias, TensorList masks);
  static Tensors backward(AutogradContext* ctx, const Tensors& cotangents);
};

struct Forward : Function<Forward> {
  static Tensor forward(AutogradContext* ctx, const Call& call, std::optional<at::ScalarType> dtype, const Tensor& input,
                        const Tensor& slots, const Tensor& weight, const OptionalTensor& bias, TensorList masks);
  static Tensors backward(AutogradContext* ctx, const Tensors& grads);
};

Tensor Forward::forward(AutogradContext* ctx, const Call& call, std::optional<at::ScalarType> dtype, const Tensor& input,
                        const Tensor& slots, const Tensor& weight, const OptionalTensor& bias, TensorList masks) {
  const Arguments given = arguments_of(input, slots, weight, bias, masks, call);
  keep(ctx, call, in_a_row({}, given));
  return raw_forward(call, given, dtype);
}

Tensors Forward::backward(AutogradContext* ctx, const Tensors& grads) {
  const Call call = call_of(ctx);
  const Tensor& grad = grads[0];
  const Arguments given = arguments_of(ctx->get_saved_variables(), 0, call);
  const Wanted wanted = wanted_of(ctx, 0, given);
  Gradients found;
  if (is_batched(grads)) {
    found = split(plain("plain_backward", call, bits_of(wanted.data(), 5), in_a_row({grad}, given)), 0, call);
  } else if (at::GradMode::is_enabled()) {
    Tensors both;
    const Tensors made = Backward::apply(call, bits_of(wanted.data(), 5), grad, given.input, given.slots, given.weight,
                                         optional(given.bias), all_masks(given, both));
    const Cotangents its = expanded(made, wanted, call);
    found = {its.input, its.weight, its.masks, its.bias, its.bias_masks};
  } else {
    found = raw_backward(call, grad, given, wanted);
  }
  const auto& [dx, dw, dmasks, db, dbias_masks] = found;
  return placed(2, {}, dx, dw, db, dmasks, dbias_masks, given);
}

Tensors Backward::forward(AutogradContext* ctx, const Call& call, int64_t wanted, const Tensor& grad, const Tensor& input,
                          const Tensor& slots, const Tensor& weight, const OptionalTensor& bias, TensorList masks) {
  const Arguments given = arguments_of(input, slots, weight, bias, masks, call);
  keep(ctx, call, in_a_row({grad}, given));
  ctx->saved_data["wanted"] = wanted;
  ctx->set_materialize_grads(false);
  const Wanted flags = flags_of<5>(wanted);
  return compact(raw_backward(call, grad, given, flags), flags);
}

Tensors Backward::backward(AutogradContext* ctx, const Tensors& cotangents) {
  const Call call = call_of(ctx);
  const Tensors saved = ctx->get_saved_variables();
  const Tensor& grad = saved[0];
  const Arguments given = arguments_of(saved, 1, call);
  const Wanted of_arguments = wanted_of(ctx, 1, given);
  const std::array<bool, 6> wanted{ctx->needs_input_grad(0), of_arguments[0], of_arguments[1],
                                   of_arguments[2],          of_arguments[3], of_arguments[4]};
  const auto defined = [](const Tensor& tensor) { return tensor.defined(); };
  if (std::none_of(cotangents.begin(), cotangents.end(), defined)) {
    return placed(2, {Tensor()}, {}, {}, {}, {}, {}, given);
  }
  const Wanted present = flags_of<5>(ctx->saved_data.at("wanted").toInt());
  const Cotangents its = expanded(cotangents, present, call);
  Tensor ddy;
  Gradients found;
  if (is_batched(cotangents) || is_batched(saved)) {
    const Tensors all = plain("plain_double_backward", call, bits_of(wanted.data(), 6), in_a_row(its, grad, given));
    ddy = all[0];
    found = split(all, 1, call);
  } else if (at::GradMode::is_enabled()) {
    // A node's inputs are all defined: zeros in the places of cotangents that are none.
    Tensors row;
    const Tensors like = compact({given.input, given.weight, given.masks, given.bias, given.bias_masks}, present);
    for (size_t i = 0; i < cotangents.size(); ++i) {
      row.push_back(cotangents[i].defined() ? cotangents[i] : at::zeros_like(like[i]));
    }
    row.push_back(grad);
    for (const Tensor& tensor : in_a_row({}, given)) {
      if (tensor.defined()) row.push_back(tensor);
    }
    const Tensors made = DoubleBackward::apply(call, int64_t(given.bias_masks.size()), bits_of(present.data(), 5),
                                               bits_of(wanted.data(), 6), TensorList(row));
    size_t next = 0;
    if (wanted[0]) ddy = made[next++];
    const Cotangents second = expanded(Tensors(made.begin() + next, made.end()), of_arguments, call);
    found = {second.input, second.weight, second.masks, second.bias, second.bias_masks};
  } else {
    auto [of_grad, dx, dw, dmasks, db, dbias_masks] = raw_double_backward(call, its, grad, given, wanted);
    ddy = of_grad;
    found = {dx, dw, dmasks, db, dbias_masks};
  }
  const auto& [dx, dw, dmasks, db, dbias_masks] = found;
  return placed(2, {ddy}, dx, dw, db, dmasks, dbias_masks, given);
}

Tensors DoubleBackward::forward(AutogradContext* ctx, const Call& call, int64_t bias_masks, int64_t present, int64_t wanted,
                                TensorList row) {
  keep(ctx, call, row.vec());
  ctx->saved_data["layout"] = std::vector<int64_t>{bias_masks, present, wanted};
  const Row its = taken_apart(row.vec(), call, bias_masks, flags_of<5>(present));
  const auto flags = flags_of<6>(wanted);
  auto [ddy, dx, dw, dmasks, db, dbias_masks] = raw_double_backward(call, its.cotangents, its.grad, its.given, flags);
  Tensors made;
  if (flags[0]) made.push_back(ddy);
  const Tensors others = compact({dx, dw, dmasks, db, dbias_masks}, {flags[1], flags[2], flags[3], flags[4], flags[5]});
  made.insert(made.end(), others.begin(), others.end());
  return made;
}

Tensors DoubleBackward::backward(AutogradContext* ctx, const Tensors& cotangents) {
  const Call call = call_of(ctx);
  const auto layout = ctx->saved_data.at("layout").toIntVector();
  const Tensors saved = ctx->get_saved_variables();
  const Row its = taken_apart(saved, call, layout[0], flags_of<5>(layout[1]));
  const Tensors row = in_a_row(its.cotangents, its.grad, its.given);
  const Tensors found = plain("plain_third_backward", call, layout[2], row, cotangents);
  Tensors made(4);
  for (size_t i = 0; i < found.size(); ++i) {
    if (row[i].defined()) made.push_back(found[i]);
  }
  return made;
}

}  // namespace task_masked_linear

namespace metamask {

at::Tensor differentiable_task_masked_linear(const Tensor& input, const Tensor& slots, const Tensor& weight, const Tensors& masks,
                                             const OptionalTensor& bias, const Tensors& bias_masks, int64_t gate_id,
                                             double gate_param, int64_t groups, std::optional<at::ScalarType> dtype) {
  const Call call{gate_id, groups, int64_t(masks.size()), gate_param};
  Tensors all = masks;
  all.insert(all.end(), bias_masks.begin(), bias_masks.end());
  return task_masked_linear::Forward::apply(call, dtype, input, slots, weight, bias, TensorList(all));
}

}  // namespace metamask
