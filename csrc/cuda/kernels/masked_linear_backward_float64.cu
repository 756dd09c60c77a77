#include "cuda/kernels/masked_linear_launch.cuh"

namespace metamask::cuda {
METAMASK_BACKWARD_OF(double, double);
}
