// masked_linear: the parts of its launchers that need no kernel.
#include "cuda/kernels/masked_linear.h"

#include "cuda/kernels/masked_linear_launch.cuh"

namespace metamask::cuda {

bool fuses_masked_linear(const LinearCase& given) {
  return with_types(given, [&]<class P, class X>() { return with_forward<P, X>(given, [](auto, auto) {}); });
}

bool fuses_masked_linear_backward(const LinearCase& given) {
  return with_types(given, [&]<class P, class X>() { return with_backward<P, X>(given, [](auto, auto) {}); });
}

int64_t masked_linear_workspace(const LinearCase& given) {
  int64_t bytes = 0;
  with_types(given, [&]<class P, class X>() {
    return with_forward<P, X>(given, [&]<class M, class Product>(Tag<M>, Tag<Product>) {
      bytes = SplitK<typename Product::Sum>::bytes(forward_blocks<Product>(given), forward_share<Product>(given).count,
                                                   kRowsOfTile * Product::kBatch);
    });
  });
  return bytes;
}

int64_t masked_linear_backward_workspace(const LinearCase& given, bool needs_dx) {
  if (!needs_dx) return 0;
  int64_t bytes = 0;
  with_types(given, [&]<class P, class X>() {
    return with_backward<P, X>(given, [&]<class M, class Product>(Tag<M>, Tag<Product>) {
      bytes = SplitK<typename Product::Sum>::bytes(backward_blocks<Product>(given), backward_share<Product>(given).count,
                                                   8 * Product::kColumns * Product::kBatch);
    });
  });
  return bytes;
}

void masked_linear(const LinearCase& given, const void* x, const void* w, const void* m, const void* bias, void* y, void* workspace,
                   cudaStream_t stream) {
  with_types(given, [&]<class P, class X>() {
    masked_linear_of<P, X>(given, x, w, m, bias, y, workspace, stream);
    return true;
  });
}

void masked_linear_backward(const LinearCase& given, const void* dy, const void* x, const void* w, const void* m, Sink dw, Sink dm,
                            void* dx, void* workspace, cudaStream_t stream) {
  with_types(given, [&]<class P, class X>() {
    masked_linear_backward_of<P, X>(given, dy, x, w, m, dw, dm, dx, workspace, stream);
    return true;
  });
}

}  // namespace metamask::cuda
