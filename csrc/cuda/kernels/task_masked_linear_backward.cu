// The launchers of the backward of task_masked_linear.
#include "cuda/kernels/task_masked_linear_launch.cuh"

namespace metamask::cuda {

int64_t task_masked_linear_backward_workspace(const TaskLinearCase& given, bool needs_dx) {
  if (given.sorted.rows() == 0 || given.in == 0 || !needs_dx) return 0;
  int64_t bytes = 0;
  with_product<TensorBackward, PlainBackward>(given, [&]<class P, class M, class Product>(Tag<P>, Tag<M>, Tag<Product>) {
    const Share shared = backward_share<Product>(given);
    const int64_t each = sizeof(typename Product::Sum);
    if (shared.count > 1) bytes = shared.count * given.sorted.rows() * given.groups * given.in * each;
  });
  return bytes;
}

void task_masked_linear_backward(const TaskLinearCase& given, const TaskParameters& parameters, const void* dy, const void* x,
                                 void* dw, const PerTask& dm, void* dx, void* workspace, cudaStream_t stream) {
  with_product<TensorBackward, PlainBackward>(given, [&]<class P, class M, class Product>(Tag<P>, Tag<M>, Tag<Product>) {
    backward<false, P, M, Product>(given, parameters, {}, dy, x, dw, dm, dx, workspace, stream);
  });
}

}  // namespace metamask::cuda
