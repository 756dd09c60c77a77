// The launchers of the second derivatives of task_masked_linear.
#include "cuda/kernels/task_masked_linear_launch.cuh"

namespace metamask::cuda {

void task_masked_linear_double_forward(const TaskLinearCase& given, const TaskParameters& parameters,
                                       const TaskCotangents& cotangents, const void* x, void* ddy, void* workspace,
                                       cudaStream_t stream) {
  with_plain<PlainForward>(given.types.weight, [&]<class P, class Product>(Tag<P>, Tag<Product>) {
    forward<true, P, P, Product>(given, parameters, cotangents, x, ddy, workspace, stream);
  });
}

void task_masked_linear_double_backward(const TaskLinearCase& given, const TaskParameters& parameters,
                                        const TaskCotangents& cotangents, const void* dy, const void* x, void* dw,
                                        const PerTask& dm, void* dx, void* workspace, cudaStream_t stream) {
  with_plain<PlainBackward>(given.types.weight, [&]<class P, class Product>(Tag<P>, Tag<Product>) {
    backward<true, P, P, Product>(given, parameters, cotangents, dy, x, dw, dm, dx, workspace, stream);
  });
}

}  // namespace metamask::cuda
