// Which kernel of task_masked_linear a case takes, by types, sizes and pointers known at run time. Forward, backward and second
// derivatives are compiled in sources of their own.
#pragma once

#include "cuda/kernels/split_k.cuh"
#include "cuda/kernels/task_masked_linear.h"
#include "cuda/kernels/task_masked_linear_backward.cuh"

namespace metamask::cuda {

// Calls run(Tag<P>, Tag<M>, Tag<Product>) for a case that has a kernel.
template <template <class, int> class Tensor, template <class, int> class Plain, class Run>
void with_product(const TaskLinearCase& given, Run run) {
  const auto sixteen = [&]<class X>(Tag<X> x) {
    const Tag<Tensor<X, kTaskRoom>> product{};
    if (given.types.weight == Type::kFloat32) run(Tag<float>{}, Tag<float>{}, product);
    else if (given.types.mask == Type::kFloat32) run(x, Tag<float>{}, product);
    else run(x, x, product);
  };
  switch (given.product) {
    case Type::kFloat64: return run(Tag<double>{}, Tag<double>{}, Tag<Plain<double, kTaskRoom>>{});
    case Type::kBFloat16: return sixteen(Tag<__nv_bfloat16>{});
    case Type::kFloat16: return sixteen(Tag<__half>{});
    default:
      if (given.tf32) return run(Tag<float>{}, Tag<float>{}, Tag<Tensor<float, kTaskRoom>>{});
      return run(Tag<float>{}, Tag<float>{}, Tag<Plain<float, kTaskRoom>>{});
  }
}

// Second derivatives multiply plainly.
template <template <class, int> class Plain, class Run>
void with_plain(Type weight, Run run) {
  if (weight == Type::kFloat64) run(Tag<double>{}, Tag<Plain<double, kTaskRoom>>{});
  else run(Tag<float>{}, Tag<Plain<float, kTaskRoom>>{});
}

inline TaskSizes sizes_of(const TaskLinearCase& given) {
  const SortedRows& s = given.sorted;
  return {given.gate.kind,
          given.bias_mask,
          s.rows(),
          given.groups,
          given.out,
          given.in,
          ceil_div(given.out / given.groups, kRowsOfTile),
          s.source,
          s.task,
          s.end};
}

inline int64_t windows(const TaskLinearCase& given) { return ceil_div(given.sorted.rows(), kTaskRoom); }

inline Share forward_share(const TaskLinearCase& given) {
  return share(given.in, kWarps * kColumnsOfStep, windows(given) * given.groups * sizes_of(given).tiles);
}

template <class Product>
Share backward_share(const TaskLinearCase& given) {
  return share(given.out / given.groups, kWarps * 4 * Product::kRows, ceil_div(given.in, 8 * Product::kColumns) * given.groups);
}

// Whether rows go by packs. One array of a list that does not begin at one makes all go element by element.
template <class P, class X, class... Pointers>
bool packs_fit(const TaskLinearCase& given, const PerTask& masks, const PerTask& other, Pointers... pointers) {
  return masks.packs && other.packs && rows_aligned<P, X>(given.in, pointers...);
}

template <bool kSecond, class P, class M, class Product>
void forward(const TaskLinearCase& given, const TaskParameters& parameters, const TaskCotangents& cotangents, const void* x,
             void* y, void* workspace, cudaStream_t stream) {
  using X = typename Product::X;
  using Sum = typename Product::Sum;
  const TaskSizes sizes = sizes_of(given);
  if (sizes.rows == 0 || sizes.out == 0) return;
  const Share shared = forward_share(given);
  const Grid grid(windows(given), given.groups * sizes.tiles, shared.count);
  Sum* split_k_sums = shared.count > 1 ? out<Sum>(workspace) : nullptr;
  const auto run = [&]<bool kAligned>() {
    launch(task_masked_linear_kernel<kSecond, kAligned, P, M, Product>, grid.blocks(), dim3(kBlock), 0, stream, sizes,
           gate_param_of<Compute<P>>(given.gate), parameters, cotangents, in<X>(x), out<X>(y), split_k_sums, shared.each, grid);
  };
  with_alignment(packs_fit<P, X>(given, parameters.masks, cotangents.masks, x, parameters.w, cotangents.dx, cotangents.dw), run);
  if (split_k_sums != nullptr) add_split_k<X>(split_k_sums, nullptr, y, shared.count, sizes.rows, sizes.out, stream);
}

template <bool kSecond, class P, class M, class Product>
void backward(const TaskLinearCase& given, const TaskParameters& parameters, const TaskCotangents& cotangents, const void* dy,
              const void* x, void* dw, const PerTask& dm, void* dx, void* workspace, cudaStream_t stream) {
  using X = typename Product::X;
  using Sum = typename Product::Sum;
  const TaskSizes sizes = sizes_of(given);
  if (sizes.rows == 0 || sizes.in == 0) return;
  const Share shared = backward_share<Product>(given);
  const Grid grid(ceil_div(given.in, 8 * Product::kColumns), shared.count, given.groups);
  Sum* split_k_sums = dx != nullptr && shared.count > 1 ? out<Sum>(workspace) : nullptr;
  const auto run = [&]<bool kAligned>() {
    launch(task_masked_linear_backward_kernel<kSecond, kAligned, P, M, Product>, grid.blocks(), dim3(kBlock), 0, stream, sizes,
           gate_param_of<Compute<P>>(given.gate), parameters, cotangents, in<X>(dy), in<X>(x), out<Compute<P>>(dw), dm, out<X>(dx),
           split_k_sums, shared.each, grid);
  };
  const bool fit = packs_fit<P, X>(given, parameters.masks, cotangents.masks, x, parameters.w, cotangents.dx, cotangents.dw, dw);
  with_alignment(fit && dm.packs, run);
  if (split_k_sums != nullptr) add_split_k<X>(split_k_sums, nullptr, dx, shared.count, sizes.rows, sizes.groups * sizes.in, stream);
}

}  // namespace metamask::cuda
