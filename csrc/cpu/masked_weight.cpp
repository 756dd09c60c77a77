// Registers masked_weight and its derivatives for the CPU. The loops are in cpu/kernels/masked_weight.cpp.
#include "cpu/masked_weight.h"

TORCH_LIBRARY_IMPL(metamask, CPU, library) {
  metamask::MaskedWeight<metamask::cpu::Cpu>::register_in(library);
  metamask::MaskedWeight<metamask::cpu::Cpu>::register_adamw_in(library);
  metamask::MaskedWeightList<metamask::cpu::Cpu>::register_in(library);
}
