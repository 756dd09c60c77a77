// The memory of tensors in the form that kernels take: arrays without strides. Nothing else takes a tensor's data pointer. Each
// accessor asserts, in every build, that the array is what the tensor says; `name` is the tensor's in the message. An assertion
// that fails is a fault of this library: an op makes its arguments contiguous where they enter, or refuses them in words.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>

namespace metamask {

// A view may be negated lazily (the imaginary part of a conjugate), and a tensor of zeros may have no memory.
inline bool holds_its_values(const at::Tensor& tensor) { return !tensor.is_neg() && !tensor._is_zerotensor(); }

// The addresses from a tensor's first element to behind its last; none without elements.
struct Extent {
  uintptr_t begin = 0, end = 0;

  explicit Extent(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.numel() == 0 || tensor._is_zerotensor()) return;
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    end = begin + (last + 1) * tensor.element_size();
  }

  bool meets(const Extent& other) const { return std::max(begin, other.begin) < std::min(end, other.end); }
};

// Returns `tensor` with its values in memory. The dispatcher does that for the arguments of all ops but those that update some, and
// not for lists of optional tensors.
inline at::Tensor resolved(const at::Tensor& tensor) {
  if (holds_its_values(tensor)) return tensor;
  return tensor._is_zerotensor() ? at::zeros(tensor.sizes(), tensor.options()) : tensor.resolve_neg();
}

inline std::optional<at::Tensor> resolved(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() ? std::optional(resolved(*tensor)) : tensor;
}

inline void assert_contiguous(const char* name, const at::Tensor& tensor) {
  TORCH_INTERNAL_ASSERT(tensor.is_contiguous() && holds_its_values(tensor), name, " is read or written as one array, with strides ",
                        tensor.strides(), " of ", tensor.sizes());
}

// Returns the elements of a contiguous tensor; null for an undefined one.
template <class T = void>
const T* data(const char* name, const at::Tensor& tensor) {
  if (!tensor.defined()) return nullptr;
  assert_contiguous(name, tensor);
  if constexpr (std::is_void_v<T>) return tensor.const_data_ptr();
  else return tensor.const_data_ptr<T>();
}

template <class T = void>
T* mutable_data(const char* name, const at::Tensor& tensor) {
  if (!tensor.defined()) return nullptr;
  assert_contiguous(name, tensor);
  if constexpr (std::is_void_v<T>) return tensor.mutable_data_ptr();
  else return tensor.mutable_data_ptr<T>();
}

// Whether a walk through both arrays meets elements of one index. Contiguous tensors may differ in the stride of a size of 1.
inline bool has_order_of(const at::Tensor& tensor, const at::Tensor& order) {
  if (tensor.is_same(order)) return order.is_non_overlapping_and_dense();
  if (tensor.sizes() != order.sizes()) return false;
  return (tensor.is_contiguous() && order.is_contiguous()) ||
         (order.is_non_overlapping_and_dense() && tensor.strides() == order.strides());
}

// Element by element the kernels walk tensors of one shape in any order of memory, if all have the same.
inline void assert_in_order(const char* name, const at::Tensor& tensor, const at::Tensor& order) {
  TORCH_INTERNAL_ASSERT(has_order_of(tensor, order) && holds_its_values(tensor), name, " is read or written in the memory order ",
                        order.strides(), " of ", order.sizes(), ", with strides ", tensor.strides(), " of ", tensor.sizes());
}

// Returns the elements of a tensor in the memory order of `order`, which is one dense block; null for an undefined tensor.
inline const void* data_in_order(const char* name, const at::Tensor& tensor, const at::Tensor& order) {
  if (!tensor.defined()) return nullptr;
  assert_in_order(name, tensor, order);
  return tensor.const_data_ptr();
}

inline void* mutable_data_in_order(const char* name, const at::Tensor& tensor, const at::Tensor& order) {
  if (!tensor.defined()) return nullptr;
  assert_in_order(name, tensor, order);
  return tensor.mutable_data_ptr();
}

// Whether each tensor[i] is contiguous, wherever it begins.
inline bool has_contiguous_parts(const at::Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d > 0; --d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

// Returns the elements of tensor[i].
inline const void* data_of_part(const char* name, const at::Tensor& tensor, int64_t i) {
  TORCH_INTERNAL_ASSERT(has_contiguous_parts(tensor) && holds_its_values(tensor), "each part of ", name,
                        " is read as one array, with strides ", tensor.strides(), " of ", tensor.sizes());
  return static_cast<const char*>(tensor.const_data_ptr()) + i * tensor.stride(0) * tensor.element_size();
}

// Returns `tensor` as one dense block of memory, in any order of dimensions: a channels-last weight stays as it is. What is not
// dense gets the order that torch's empty_like has, in which the fake kernels see the results.
inline at::Tensor dense(const at::Tensor& tensor) {
  return tensor.is_non_overlapping_and_dense() ? tensor : at::empty_like(tensor).copy_(tensor);
}

// Returns `tensor` with its elements in the memory order of `order`, which is dense.
inline at::Tensor laid_out_as(const at::Tensor& tensor, const at::Tensor& order) {
  if (tensor.strides() == order.strides() || tensor.numel() < 2) return tensor;
  return at::empty_strided(order.sizes(), order.strides(), tensor.options()).copy_(tensor);
}

}  // namespace metamask
