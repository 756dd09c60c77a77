// What the torch side tells the kernels: element types and the gate. No torch, no CUDA headers.
#pragma once

#include "gate.h"

namespace metamask {

enum class Type : int { kFloat64, kFloat32, kBFloat16, kFloat16 };

// A gate with its parameter: the temperature of the sigmoid, the threshold of the hard gate.
struct Gate {
  GateKind kind;
  double parameter;
};

// The parameter in the form that gate_values takes.
template <class T>
METAMASK_INLINE T parameter_of(Gate gate) {
  return T(gate.kind == kSigmoid ? 1.0 / gate.parameter : gate.parameter);
}

}  // namespace metamask
