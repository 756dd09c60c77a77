// Registers the ops on masks of one bit a weight for CUDA tensors.
#include "cuda/packed.h"

TORCH_LIBRARY_IMPL(metamask, CUDA, library) { metamask::cuda::CudaPacked::register_in(library); }
