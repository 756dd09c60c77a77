// Registers masked_weight and its derivatives for CUDA tensors.
#include "masked_weight_torch.h"

TORCH_LIBRARY_IMPL(metamask, CUDA, library) {
  metamask::MaskedWeight<metamask::cuda::Cuda>::register_in(library);
  metamask::MaskedWeightList<metamask::cuda::Cuda>::register_in(library);
}
