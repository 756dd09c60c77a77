// Registers masked_linear and its gradients for CUDA tensors.
#include "cuda/masked_linear.h"

TORCH_LIBRARY_IMPL(metamask, CUDA, library) { metamask::MaskedLinear<metamask::cuda::CudaLinear>::register_in(library); }
