// Which kernel of masked_linear a case takes, by types, sizes and pointers known at run time, and how many blocks share a sum. The
// kernels of each type of product, and type of weight beside it, are compiled in sources of their own, masked_linear_<type>.cu and
// masked_linear_backward_<type>.cu: one source of them all takes minutes.
#pragma once

#include "cuda/kernels/masked_linear.h"
#include "cuda/kernels/masked_linear_backward.cuh"

namespace metamask::cuda {

constexpr int kFew = 8;  // the samples that one mma has room for

// Calls run.operator()<P, X>() for the type of a case's weight and that of its product. Returns false if no kernel has these.
template <class Run>
bool with_types(const LinearCase& given, Run run) {
  return with_type(given.product, [&]<class X>(Tag<X>) {
    if (given.types.weight == given.product) return run.template operator()<X, X>();
    if constexpr (sizeof(X) == 2) {
      // Parameters of float32, under autocast.
      if (given.types.weight == Type::kFloat32) return run.template operator()<float, X>();
    }
    return false;
  });
}

// Calls run(Tag<M>, Tag<Product>) for the kernel of a case with weights of type P and a product of type X: Tensor<X, room> or
// Plain<X, room>, where room is kFew if that holds the batch, else kMany. Returns false if the batch is larger than kMost, or there
// is nothing to multiply.
template <class P, class X, int kMost, template <class, int> class Tensor, int kManyTensor, template <class, int> class Plain,
          int kManyPlain, class Run>
bool with_product(const LinearCase& given, Run run) {
  if (given.out == 0 || given.in == 0 || given.batch < 1 || given.batch > kMost) return false;
  const auto with_room = [&]<class M, class Few, class Many>(Tag<M> m, Tag<Few> few, Tag<Many> many) {
    if (given.batch <= Few::kBatch) run(m, few);
    else run(m, many);
    return true;
  };
  const auto tensor = [&](auto m) { return with_room(m, Tag<Tensor<X, kFew>>{}, Tag<Tensor<X, kManyTensor>>{}); };
  if constexpr (sizeof(X) >= 4) {
    const auto plain = [&] { return with_room(Tag<X>{}, Tag<Plain<X, kFew>>{}, Tag<Plain<X, kManyPlain>>{}); };
    if constexpr (sizeof(X) == 4) return given.tf32 ? tensor(Tag<X>{}) : plain();
    else return plain();
  } else if constexpr (sizeof(P) == 4) {
    return tensor(Tag<float>{});
  } else {
    return given.types.mask == Type::kFloat32 ? tensor(Tag<float>{}) : tensor(Tag<X>{});
  }
}

template <class P, class X, class Run>
bool with_forward(const LinearCase& given, Run run) {
  return with_product < P, X, 64, TensorForward, 64, PlainForward, sizeof(X) == 8 ? 16 : 32 > (given, run);
}

// For few samples a lane has a pack of four rows.
template <class T, int kBatch>
using PlainStrip =
    std::conditional_t<kBatch == kFew, PlainBackward<T, kBatch, kPackBytes / int(sizeof(T)), 4>, PlainBackward<T, kBatch>>;

template <class P, class X, class Run>
bool with_backward(const LinearCase& given, Run run) {
  return with_product<P, X, 32, TensorBackward, 32, PlainStrip, 32>(given, run);
}

template <class Product>
int64_t forward_blocks(const LinearCase& given) {
  return ceil_div(given.out, kRowsOfTile) * ceil_div(given.batch, Product::kBatch);
}

template <class Product>
Share forward_share(const LinearCase& given) {
  return share(given.in, kWarps * kColumnsOfStep, forward_blocks<Product>(given));
}

template <class Product>
int64_t backward_blocks(const LinearCase& given) {
  return ceil_div(given.in, 8 * Product::kColumns);
}

template <class Product>
Share backward_share(const LinearCase& given) {
  return share(given.out, kWarps * 4 * Product::kRows, backward_blocks<Product>(given));
}

template <class Run>
void with_gate_and_alignment(GateKind kind, bool packs, Run run) {
  with_alignment(packs, [&]<bool kAligned>() {
    if (kind == kSigmoid) run.template operator()<kSigmoid, kAligned>();
    else run.template operator()<kHard, kAligned>();
  });
}

template <class P, class X>
void masked_linear_of(const LinearCase& given, const void* x, const void* w, const void* m, const void* bias, void* y,
                      void* workspace, cudaStream_t stream) {
  with_forward<P, X>(given, [&]<class M, class Product>(Tag<M>, Tag<Product>) {
    const Share shared = forward_share<Product>(given);
    const int64_t blocks = forward_blocks<Product>(given);
    const auto split = SplitK<typename Product::Sum>::in(workspace, blocks, shared.count);
    with_gate_and_alignment(given.gate.kind, rows_aligned<P, X>(given.in, x, w, m), [&]<GateKind kind, bool kAligned>() {
      launch(masked_linear_kernel<kind, kAligned, P, M, Product>, grid_of(blocks, shared.count), dim3(kBlock), 0, stream,
             gate_param_of<Compute<P>>(given.gate), in<X>(x), in<P>(w), in<M>(m), in<X>(bias), out<X>(y), split, int(given.batch),
             given.out, given.in, shared.each);
    });
  });
}

template <class P, class X>
void masked_linear_backward_of(const LinearCase& given, const void* dy, const void* x, const void* w, const void* m, Sink dw,
                               Sink dm, void* dx, void* workspace, cudaStream_t stream) {
  with_backward<P, X>(given, [&]<class M, class Product>(Tag<M>, Tag<Product>) {
    const Share shared = backward_share<Product>(given);
    const int64_t blocks = backward_blocks<Product>(given);
    const auto split = SplitK<typename Product::Sum>::in(workspace, blocks, dx != nullptr ? shared.count : 1);
    const bool packs = rows_aligned<P, X>(given.in, x, w, m, dw.gradient, dw.momentum_buffer, dm.gradient, dm.momentum_buffer);
    with_gate_and_alignment(given.gate.kind, packs, [&]<GateKind kind, bool kAligned>() {
      launch(masked_linear_backward_kernel<kind, kAligned, P, M, Product>, grid_of(blocks, shared.count), dim3(kBlock), 0, stream,
             gate_param_of<Compute<P>>(given.gate), in<X>(dy), in<X>(x), in<P>(w), in<M>(m), dw, dm, out<X>(dx), split,
             int(given.batch), given.out, given.in, shared.each);
    });
  });
}

// Each instance is defined in a source of its own.
#define METAMASK_FORWARD_OF(P, X)                                                                                           \
  template void masked_linear_of<P, X>(const LinearCase&, const void*, const void*, const void*, const void*, void*, void*, \
                                       cudaStream_t)
#define METAMASK_BACKWARD_OF(P, X)                                                                                                 \
  template void masked_linear_backward_of<P, X>(const LinearCase&, const void*, const void*, const void*, const void*, Sink, Sink, \
                                                void*, void*, cudaStream_t)
extern METAMASK_FORWARD_OF(double, double);
extern METAMASK_FORWARD_OF(float, float);
extern METAMASK_FORWARD_OF(float, __nv_bfloat16);
extern METAMASK_FORWARD_OF(float, __half);
extern METAMASK_FORWARD_OF(__nv_bfloat16, __nv_bfloat16);
extern METAMASK_FORWARD_OF(__half, __half);
extern METAMASK_BACKWARD_OF(double, double);
extern METAMASK_BACKWARD_OF(float, float);
extern METAMASK_BACKWARD_OF(float, __nv_bfloat16);
extern METAMASK_BACKWARD_OF(float, __half);
extern METAMASK_BACKWARD_OF(__nv_bfloat16, __nv_bfloat16);
extern METAMASK_BACKWARD_OF(__half, __half);

}  // namespace metamask::cuda
