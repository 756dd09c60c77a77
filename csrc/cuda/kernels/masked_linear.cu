// masked_linear: the parts of its launchers that need no kernel.
#include "cuda/kernels/masked_linear.h"

#include "cuda/kernels/masked_linear_launch.cuh"

namespace metamask::cuda {

bool fuses_masked_linear(const LinearCase& given) {
  bool fuses = false;
  with_type(given.product, [&]<class X>(Tag<X>) { fuses = with_forward<X>(given, [](auto, auto, auto) {}); });
  return fuses;
}

bool fuses_masked_linear_backward(const LinearCase& given) {
  bool fuses = false;
  with_type(given.product, [&]<class X>(Tag<X>) { fuses = with_backward<X>(given, [](auto, auto, auto) {}); });
  return fuses;
}

int64_t masked_linear_workspace(const LinearCase& given) {
  int64_t bytes = 0;
  with_type(given.product, [&]<class X>(Tag<X>) {
    with_forward<X>(given, [&]<class P, class M, class Product>(Tag<P>, Tag<M>, Tag<Product>) {
      bytes = SplitK<typename Product::Sum>::bytes(forward_blocks<Product>(given), forward_share<Product>(given).count,
                                                   kRowsOfTile * Product::kBatch);
    });
  });
  return bytes;
}

int64_t masked_linear_backward_workspace(const LinearCase& given, bool needs_dx) {
  if (!needs_dx) return 0;
  int64_t bytes = 0;
  with_type(given.product, [&]<class X>(Tag<X>) {
    with_backward<X>(given, [&]<class P, class M, class Product>(Tag<P>, Tag<M>, Tag<Product>) {
      bytes = SplitK<typename Product::Sum>::bytes(backward_blocks<Product>(given), backward_share<Product>(given).count,
                                                   8 * Product::kColumns * Product::kBatch);
    });
  });
  return bytes;
}

void masked_linear(const LinearCase& given, const void* x, const void* w, const void* m, const void* bias, void* y, void* workspace,
                   cudaStream_t stream) {
  with_type(given.product, [&]<class X>(Tag<X>) { masked_linear_of<X>(given, x, w, m, bias, y, workspace, stream); });
}

void masked_linear_backward(const LinearCase& given, const void* dy, const void* x, const void* w, const void* m, Sink dw, Sink dm,
                            void* dx, void* workspace, cudaStream_t stream) {
  with_type(given.product,
            [&]<class X>(Tag<X>) { masked_linear_backward_of<X>(given, dy, x, w, m, dw, dm, dx, workspace, stream); });
}

}  // namespace metamask::cuda
