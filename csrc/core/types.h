// Element types, the gate, and the other arguments that the torch side gives to the kernels. No torch, no CUDA headers.
#pragma once

#include "core/gate.h"

namespace metamask {

constexpr int kPackBytes = 16;  // the widest load and store of a GPU

enum class Type : int { kFloat64, kFloat32, kBFloat16, kFloat16 };

constexpr int64_t bytes_of(Type type) { return type == Type::kFloat64 ? 8 : type == Type::kFloat32 ? 4 : 2; }

// The types that a weight and its logits are stored in: one, or float32 logits beside a weight of 16 bits. What belongs to one of
// them (gradient, momentum buffer, cotangent) has its type.
struct ParamTypes {
  Type weight, mask;
};

// A gate and its parameter: the temperature of the sigmoid, or the threshold of the hard gate.
struct Gate {
  GateKind kind;
  double param;
};

// Returns the gate's parameter in the form that gate_values takes.
template <class T>
METAMASK_INLINE T gate_param_of(Gate gate) {
  return T(gate.kind == kSigmoid ? 1.0 / gate.param : gate.param);
}

// One step of stochastic gradient descent, as torch.optim.SGD takes it.
struct Sgd {
  double lr, weight_decay, momentum;
};

// Returns the new value of a parameter p with gradient g, and updates the element of its momentum buffer.
template <class T>
METAMASK_INLINE T descend(T p, T g, Sgd sgd, T& momentum_buffer) {
  momentum_buffer = T(sgd.momentum) * momentum_buffer + (g + T(sgd.weight_decay) * p);
  return p - T(sgd.lr) * momentum_buffer;
}

// The destination of a parameter's gradient. At most one of `gradient` and `parameter` is set; with neither, nobody wants it.
struct Sink {
  void* gradient = nullptr;         // receives the gradient
  void* parameter = nullptr;        // takes a step along the gradient instead
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
