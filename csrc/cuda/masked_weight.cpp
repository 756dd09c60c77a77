// Registers masked_weight and its derivatives for CUDA tensors.
#include "cuda/masked_weight.h"

TORCH_LIBRARY_IMPL(metamask, CUDA, library) {
  metamask::MaskedWeight<metamask::cuda::Cuda>::register_in(library);
  metamask::MaskedWeightList<metamask::cuda::Cuda>::register_in(library);
}
