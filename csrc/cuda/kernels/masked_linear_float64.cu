#include "cuda/kernels/masked_linear_launch.cuh"

namespace metamask::cuda {
METAMASK_FORWARD_OF(double, double);
}
