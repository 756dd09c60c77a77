// Launchers: from types, sizes and pointers known at run time to one kernel, and how many blocks share a sum.
#include "masked_linear.h"

#include "launch.cuh"
#include "masked_linear_backward.cuh"

namespace metamask::cuda {
namespace {

constexpr int kFew = 8;  // samples: what one mma has room for

template <class T>
struct Tag {
  using type = T;
};

// Calls run(Tag<P>, Tag<Product>) for the kernels of a case: Tensor<X, room> or Plain<X, room>, where room is kFew or kMany,
// the least that holds the batch. False: there is none.
template <template <class, int> class Tensor, int kManyTensor, template <class, int> class Plain, int kManyPlain, class Run>
bool with_product(const LinearCase& given, Run run) {
  const auto with_room = [&]<class P, class Few, class Many>(Tag<P> p, Tag<Few> few, Tag<Many> many) {
    if (given.batch < 1 || given.batch > Many::kBatch) return false;
    if (given.batch <= Few::kBatch) run(p, few);
    else run(p, many);
    return true;
  };
  const auto tensor = [&]<class P, class X>(Tag<P> p, Tag<X>) {
    return with_room(p, Tag<Tensor<X, kFew>>{}, Tag<Tensor<X, kManyTensor>>{});
  };
  const auto plain = [&]<class T>(Tag<T> p) { return with_room(p, Tag<Plain<T, kFew>>{}, Tag<Plain<T, kManyPlain>>{}); };
  if (given.out == 0 || given.in == 0) return false;
  const bool widened = given.param == Type::kFloat32;  // parameters of float32 under autocast
  switch (given.product) {
    case Type::kFloat64: return plain(Tag<double>{});
    case Type::kBFloat16:
      if (widened) return tensor(Tag<float>{}, Tag<__nv_bfloat16>{});
      return given.param == Type::kBFloat16 && tensor(Tag<__nv_bfloat16>{}, Tag<__nv_bfloat16>{});
    case Type::kFloat16:
      if (widened) return tensor(Tag<float>{}, Tag<__half>{});
      return given.param == Type::kFloat16 && tensor(Tag<__half>{}, Tag<__half>{});
    default:
      if (!widened) return false;
      return given.tf32 ? tensor(Tag<float>{}, Tag<float>{}) : plain(Tag<float>{});
  }
}

template <class Run>
bool with_forward(const LinearCase& given, Run run) {
  return with_product<TensorForward, 64, PlainForward, 32>(given, run);
}

template <class Run>
bool with_backward(const LinearCase& given, Run run) {
  return with_product<TensorBackward, 32, PlainBackward, 32>(given, run);
}

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// How a sum over `length` is shared out: `count` blocks, `each` of it a block.
struct Share {
  int count;
  int64_t each;
};

// `step` of it is what a block takes at a time. Eight blocks for each multiprocessor keep all of them busy to the end, where there
// is that much to do; more only make the sums of the blocks cost more.
Share share(int64_t length, int64_t step, int64_t blocks_without) {
  const int64_t steps = ceil_div(length, step), most = 64;
  const int64_t wanted = ceil_div(8 * int64_t(multiprocessors()), blocks_without);
  const int64_t count = wanted < steps ? wanted : steps, each = ceil_div(steps, count < most ? count : most) * step;
  return {int(ceil_div(length, each)), each};
}

Share forward_share(const LinearCase& given) { return share(given.in, kWarps * kColumnsOfStep, ceil_div(given.out, kRowsOfTile)); }

template <class Product>
Share backward_share(const LinearCase& given) {
  return share(given.out, kWarps * 4 * Product::kRows, ceil_div(given.in, 8 * Product::kColumns));
}

// Rows are whole packs of both types, and begin where packs may.
template <class P, class X, class... Pointers>
bool rows_aligned(int64_t in, Pointers... pointers) {
  return in * int64_t(sizeof(P)) % kPackBytes == 0 && in * int64_t(sizeof(X)) % kPackBytes == 0 && aligned(pointers...);
}

template <class Run>
void with_gate_and_alignment(GateKind kind, bool packs, Run run) {
  if (kind == kSigmoid) {
    if (packs) run.template operator()<kSigmoid, true>();
    else run.template operator()<kSigmoid, false>();
  } else {
    if (packs) run.template operator()<kHard, true>();
    else run.template operator()<kHard, false>();
  }
}

template <class X, class Sum>
void add_partial(const Sum* partial, const void* bias, void* result, int count, int64_t rows, int64_t columns,
                 cudaStream_t stream) {
  const int64_t n = rows * columns;
  launch(add_partial_kernel<X, Sum>, dim3(unsigned(ceil_div(n, kBlock))), dim3(kBlock), 0, stream, partial, in<X>(bias),
         out<X>(result), count, n, columns);
}

}  // namespace

bool fuses_masked_linear(const LinearCase& given) {
  return with_forward(given, [](auto, auto) {});
}

bool fuses_masked_linear_backward(const LinearCase& given) {
  return with_backward(given, [](auto, auto) {});
}

int64_t masked_linear_workspace(const LinearCase& given) {
  int64_t bytes = 0;
  with_forward(given, [&]<class P, class Product>(Tag<P>, Tag<Product>) {
    const Share shared = forward_share(given);
    if (shared.count > 1) bytes = shared.count * given.batch * given.out * int64_t(sizeof(typename Product::Sum));
  });
  return bytes;
}

int64_t masked_linear_backward_workspace(const LinearCase& given, bool needs_dx) {
  int64_t bytes = 0;
  with_backward(given, [&]<class P, class Product>(Tag<P>, Tag<Product>) {
    const Share shared = backward_share<Product>(given);
    if (needs_dx && shared.count > 1) bytes = shared.count * given.batch * given.in * int64_t(sizeof(typename Product::Sum));
  });
  return bytes;
}

void masked_linear(const LinearCase& given, const void* x, const void* w, const void* m, const void* bias, void* y, void* workspace,
                   cudaStream_t stream) {
  with_forward(given, [&]<class P, class Product>(Tag<P>, Tag<Product>) {
    using X = typename Product::X;
    using Sum = typename Product::Sum;
    const Share shared = forward_share(given);
    const dim3 grid(unsigned(ceil_div(given.out, kRowsOfTile)), unsigned(shared.count));
    Sum* partial = shared.count > 1 ? out<Sum>(workspace) : nullptr;
    with_gate_and_alignment(given.gate.kind, rows_aligned<P, X>(given.in, x, w, m), [&]<GateKind kind, bool kAligned>() {
      launch(masked_linear_kernel<kind, kAligned, P, Product>, grid, dim3(kBlock), 0, stream, parameter_of<Compute<P>>(given.gate),
             in<X>(x), in<P>(w), in<P>(m), in<X>(bias), out<X>(y), partial, int(given.batch), given.out, given.in, shared.each);
    });
    if (partial != nullptr) add_partial<X>(partial, bias, y, shared.count, given.batch, given.out, stream);
  });
}

void masked_linear_backward(const LinearCase& given, const void* dy, const void* x, const void* w, const void* m, Sink dw, Sink dm,
                            void* dx, void* workspace, cudaStream_t stream) {
  with_backward(given, [&]<class P, class Product>(Tag<P>, Tag<Product>) {
    using X = typename Product::X;
    using Sum = typename Product::Sum;
    const Share shared = backward_share<Product>(given);
    const dim3 grid(unsigned(ceil_div(given.in, 8 * Product::kColumns)), unsigned(shared.count));
    Sum* partial = dx != nullptr && shared.count > 1 ? out<Sum>(workspace) : nullptr;
    const bool packs = rows_aligned<P, X>(given.in, x, w, m, dw.gradient, dw.velocity, dm.gradient, dm.velocity);
    with_gate_and_alignment(given.gate.kind, packs, [&]<GateKind kind, bool kAligned>() {
      launch(masked_linear_backward_kernel<kind, kAligned, P, Product>, grid, dim3(kBlock), 0, stream,
             parameter_of<Compute<P>>(given.gate), in<X>(dy), in<X>(x), in<P>(w), in<P>(m), dw, dm, out<X>(dx), partial,
             int(given.batch), given.out, given.in, shared.each);
    });
    if (partial != nullptr) add_partial<X>(partial, nullptr, dx, shared.count, given.batch, given.in, stream);
  });
}

}  // namespace metamask::cuda
