// Registers task_masked_linear and its derivatives for CUDA tensors.
#include "cuda/task_masked_linear.h"

TORCH_LIBRARY_IMPL(metamask, CUDA, library) { metamask::TaskMaskedLinear<metamask::cuda::CudaTaskLinear>::register_in(library); }
