// What the torch side tells the kernels: element types and the gate. No torch, no CUDA headers.
#pragma once

#include "core/gate.h"

namespace metamask {

enum class Type : int { kFloat64, kFloat32, kBFloat16, kFloat16 };

// A gate with its parameter: the temperature of the sigmoid, the threshold of the hard gate.
struct Gate {
  GateKind kind;
  double param;
};

// The parameter in the form that gate_values takes.
template <class T>
METAMASK_INLINE T gate_param_of(Gate gate) {
  return T(gate.kind == kSigmoid ? 1.0 / gate.param : gate.param);
}

// One step of stochastic gradient descent, as torch.optim.SGD takes it.
struct Sgd {
  double lr, weight_decay, momentum;
};

// The new value of a parameter p with gradient g. `momentum_buffer` is its momentum buffer's element.
template <class T>
METAMASK_INLINE T descend(T p, T g, Sgd sgd, T& momentum_buffer) {
  momentum_buffer = T(sgd.momentum) * momentum_buffer + (g + T(sgd.weight_decay) * p);
  return p - T(sgd.lr) * momentum_buffer;
}

// What becomes of the gradient of a parameter. At most one of `gradient` and `parameter` is given; neither: it is not wanted.
struct Sink {
  void* gradient = nullptr;         // where it is written
  void* parameter = nullptr;        // what one step along it changes
  void* momentum_buffer = nullptr;  // the parameter's momentum buffer; null: none
  Sgd sgd = {};

  METAMASK_INLINE bool wanted() const { return gradient != nullptr || parameter != nullptr; }
};

// The arrays of one weight of a list, `n` elements each in one order, as masked_weight and its derivatives take them. A null
// cotangent is zero, a null output is not wanted.
struct ForwardArrays {
  const void *w, *m;
  void* theta;
  int64_t n;
};

struct BackwardArrays {
  const void *g, *w, *m;
  void *dw, *dm;
  int64_t n;
};

struct DoubleBackwardArrays {
  const void *a, *b, *g, *w, *m;
  void *dg, *dw, *dm;
  int64_t n;
};

}  // namespace metamask
