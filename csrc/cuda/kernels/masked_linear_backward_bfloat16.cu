#include "cuda/kernels/masked_linear_launch.cuh"

namespace metamask::cuda {
METAMASK_BACKWARD_OF(__nv_bfloat16, __nv_bfloat16);
}
