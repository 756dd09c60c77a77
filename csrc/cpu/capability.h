// The instruction set that the CPU kernels run in.
#pragma once

#include <string>
#include <vector>

namespace metamask::cpu {

enum class Capability : int { kDefault, kAvx2, kAvx512, kAvx512Bf16 };

// Returns the best set that the machine has and this build holds, or the one that the environment variable METAMASK_CPU_CAPABILITY
// names (default, avx2, avx512, avx512_bf16). Decided once. Throws c10::ValueError for an unknown name, or a set that the machine
// lacks.
Capability capability();

const char* name_of(Capability capability);

// Returns all sets that this machine can run, the slowest first.
std::vector<std::string> available_capabilities();

// METAMASK_CHOSEN_TABLE(kGemm): the table of cpu/kernels/isa.h that capability() asks for.
#if defined(METAMASK_X86)
template <class Table>
const Table& chosen_table(const Table& plain, const Table& avx2, const Table& avx512, const Table& avx512_bf16) {
  switch (capability()) {
    case Capability::kAvx512Bf16: return avx512_bf16;
    case Capability::kAvx512: return avx512;
    case Capability::kAvx2: return avx2;
    default: return plain;
  }
}
#define METAMASK_CHOSEN_TABLE(name) ::metamask::cpu::chosen_table(name##_default, name##_avx2, name##_avx512, name##_avx512_bf16)
#else
#define METAMASK_CHOSEN_TABLE(name) name##_default
#endif

}  // namespace metamask::cpu
