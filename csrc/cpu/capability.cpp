#include "cpu/capability.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <cstdlib>
#include <cstring>

namespace metamask::cpu {
namespace {

constexpr Capability kAll[] = {Capability::kDefault, Capability::kAvx2, Capability::kAvx512, Capability::kAvx512Bf16};

bool supported(Capability capability) {
  switch (capability) {
    case Capability::kDefault: return true;
#if defined(METAMASK_X86)
    case Capability::kAvx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Capability::kAvx512:
      return supported(Capability::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Capability::kAvx512Bf16: return supported(Capability::kAvx512) && __builtin_cpu_supports("avx512bf16");
#endif
    default: return false;
  }
}

Capability choose() {
  const char* wanted = std::getenv("METAMASK_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') {
    Capability best = Capability::kDefault;
    for (const Capability capability : kAll) {
      if (supported(capability)) best = capability;
    }
    return best;
  }
  for (const Capability capability : kAll) {
    if (std::strcmp(wanted, name_of(capability)) == 0) {
      TORCH_CHECK_VALUE(supported(capability), "METAMASK_CPU_CAPABILITY is ", wanted, ", which this processor lacks; it has ",
                        c10::Join(", ", available_capabilities()));
      return capability;
    }
  }
  TORCH_CHECK_VALUE(false, "METAMASK_CPU_CAPABILITY must be default, avx2, avx512 or avx512_bf16, got '", wanted, "'");
}

}  // namespace

Capability capability() {
  static const Capability chosen = choose();
  return chosen;
}

const char* name_of(Capability capability) {
  switch (capability) {
    case Capability::kAvx2: return "avx2";
    case Capability::kAvx512: return "avx512";
    case Capability::kAvx512Bf16: return "avx512_bf16";
    default: return "default";
  }
}

std::vector<std::string> available_capabilities() {
  std::vector<std::string> names;
  for (const Capability capability : kAll) {
    if (supported(capability)) names.emplace_back(name_of(capability));
  }
  return names;
}

}  // namespace metamask::cpu
