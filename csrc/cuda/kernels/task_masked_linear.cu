// The launchers of task_masked_linear.
#include "cuda/kernels/task_masked_linear_launch.cuh"

namespace metamask::cuda {

int64_t task_masked_linear_workspace(const TaskLinearCase& given) {
  if (given.sorted.rows() == 0 || given.out == 0) return 0;
  const Share shared = forward_share(given);
  return shared.count > 1 ? shared.count * given.sorted.rows() * given.out * compute_bytes(given.types.weight) : 0;
}

void task_masked_linear(const TaskLinearCase& given, const TaskParameters& parameters, const void* x, void* y, void* workspace,
                        cudaStream_t stream) {
  with_product<TensorForward, PlainForward>(given, [&]<class P, class M, class Product>(Tag<P>, Tag<M>, Tag<Product>) {
    forward<false, P, M, Product>(given, parameters, {}, x, y, workspace, stream);
  });
}

}  // namespace metamask::cuda
