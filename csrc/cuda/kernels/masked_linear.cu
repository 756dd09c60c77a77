// Launchers of masked_linear: they choose one kernel from types, sizes and pointers known at run time, and how many blocks share a
// sum.
#include "cuda/kernels/masked_linear.h"

#include "cuda/kernels/masked_linear_backward.cuh"

namespace metamask::cuda {
namespace {

constexpr int kFew = 8;  // the samples that one mma has room for

// Calls run(Tag<P>, Tag<M>, Tag<Product>) for the kernels of a case: Tensor<X, room> or Plain<X, room>, where room is kFew if that
// holds the batch, else kMany. Returns false if there is no kernel, or the batch is larger than kMost.
template <int kMost, template <class, int> class Tensor, int kManyTensor, template <class, int> class Plain, int kManyPlain,
          class Run>
bool with_product(const LinearCase& given, Run run) {
  const auto with_room = [&]<class P, class M, class Few, class Many>(Tag<P> p, Tag<M> m, Tag<Few> few, Tag<Many> many) {
    if (given.batch < 1 || given.batch > kMost) return false;
    if (given.batch <= Few::kBatch) run(p, m, few);
    else run(p, m, many);
    return true;
  };
  const auto tensor = [&]<class P, class M, class X>(Tag<P> p, Tag<M> m, Tag<X>) {
    return with_room(p, m, Tag<Tensor<X, kFew>>{}, Tag<Tensor<X, kManyTensor>>{});
  };
  const auto plain = [&]<class T>(Tag<T> p) { return with_room(p, p, Tag<Plain<T, kFew>>{}, Tag<Plain<T, kManyPlain>>{}); };
  if (given.out == 0 || given.in == 0) return false;
  const Type weight = given.types.weight;
  const bool widened = weight == Type::kFloat32;  // parameters of float32 under autocast
  const auto sixteen = [&]<class X>(Tag<X> x) {
    if (widened) return tensor(Tag<float>{}, Tag<float>{}, x);
    if (weight != given.product) return false;
    return given.types.mask == Type::kFloat32 ? tensor(x, Tag<float>{}, x) : tensor(x, x, x);
  };
  switch (given.product) {
    case Type::kFloat64: return plain(Tag<double>{});
    case Type::kBFloat16: return sixteen(Tag<__nv_bfloat16>{});
    case Type::kFloat16: return sixteen(Tag<__half>{});
    default:
      if (!widened) return false;
      return given.tf32 ? tensor(Tag<float>{}, Tag<float>{}, Tag<float>{}) : plain(Tag<float>{});
  }
}

template <class Run>
bool with_forward(const LinearCase& given, Run run) {
  return with_product<64, TensorForward, 64, PlainForward, 32>(given, run);
}

template <class Run>
bool with_backward(const LinearCase& given, Run run) {
  return with_product<32, TensorBackward, 32, PlainBackward, 32>(given, run);
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

}  // namespace

bool fuses_masked_linear(const LinearCase& given) {
  return with_forward(given, [](auto, auto, auto) {});
}

bool fuses_masked_linear_backward(const LinearCase& given) {
  return with_backward(given, [](auto, auto, auto) {});
}

int64_t masked_linear_workspace(const LinearCase& given) {
  int64_t bytes = 0;
  with_forward(given, [&]<class P, class M, class Product>(Tag<P>, Tag<M>, Tag<Product>) {
    bytes = SplitK<typename Product::Sum>::bytes(forward_blocks<Product>(given), forward_share<Product>(given).count,
                                                 kRowsOfTile * Product::kBatch);
  });
  return bytes;
}

int64_t masked_linear_backward_workspace(const LinearCase& given, bool needs_dx) {
  int64_t bytes = 0;
  with_backward(given, [&]<class P, class M, class Product>(Tag<P>, Tag<M>, Tag<Product>) {
    const int64_t room = 8 * Product::kColumns * Product::kBatch;
    if (needs_dx) {
      bytes = SplitK<typename Product::Sum>::bytes(backward_blocks<Product>(given), backward_share<Product>(given).count, room);
    }
  });
  return bytes;
}

void masked_linear(const LinearCase& given, const void* x, const void* w, const void* m, const void* bias, void* y, void* workspace,
                   cudaStream_t stream) {
  with_forward(given, [&]<class P, class M, class Product>(Tag<P>, Tag<M>, Tag<Product>) {
    using X = typename Product::X;
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

void masked_linear_backward(const LinearCase& given, const void* dy, const void* x, const void* w, const void* m, Sink dw, Sink dm,
                            void* dx, void* workspace, cudaStream_t stream) {
  with_backward(given, [&]<class P, class M, class Product>(Tag<P>, Tag<M>, Tag<Product>) {
    using X = typename Product::X;
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

}  // namespace metamask::cuda
