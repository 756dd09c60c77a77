// The instruction set that the CPU kernels run in.
#pragma once

#include <string>
#include <vector>

namespace metamask::cpu {

enum class Capability : int { kDefault, kAvx2, kAvx512, kAvx512Bf16 };

// The best one that the machine has and this build holds; the variable METAMASK_CPU_CAPABILITY (default, avx2, avx512, avx512_bf16)
// asks for another. Chosen once; throws c10::ValueError for a name that is unknown or a set that the machine lacks.
Capability capability();

const char* name_of(Capability capability);

// All that this machine can run, the slowest first.
std::vector<std::string> available_capabilities();

}  // namespace metamask::cpu
