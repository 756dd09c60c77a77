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

// One step of AdamW, as torch.optim.AdamW takes it, with the corrections of its two means: `kept` is 1 - lr * weight_decay, `rate`
// lr / (1 - beta1^step), `scale` 1 / sqrt(1 - beta2^step).
struct AdamW {
  double kept, beta1, beta2, rate, scale, eps;
};

// Returns the new value of a parameter p with gradient g, and updates the elements of the means of g and of g * g. For the host: on
// CUDA torch's own kernel takes this step.
template <class T>
METAMASK_INLINE T descend(T p, T g, AdamW adamw, T& exp_avg, T& exp_avg_sq) {
  exp_avg = T(adamw.beta1) * exp_avg + T(1 - adamw.beta1) * g;
  exp_avg_sq = T(adamw.beta2) * exp_avg_sq + T(1 - adamw.beta2) * g * g;
  T root;
  // Not std::sqrt: an inline function of the standard library may be shared between instruction sets.
  if constexpr (sizeof(T) == sizeof(float)) root = __builtin_sqrtf(exp_avg_sq);
  else root = __builtin_sqrt(exp_avg_sq);
  return T(adamw.kept) * p - T(adamw.rate) * exp_avg / (root * T(adamw.scale) + T(adamw.eps));
}

// The destination of a parameter's gradient. At most one of `gradient` and `parameter` is set; with neither, nobody wants it. A
// step is one of AdamW where its means are set, else of SGD.
struct Sink {
  void* gradient = nullptr;         // receives the gradient
  void* parameter = nullptr;        // takes a step along the gradient instead
  void* momentum_buffer = nullptr;  // the parameter's momentum buffer; null: none
  Sgd sgd = {};
  void *exp_avg = nullptr, *exp_avg_sq = nullptr;  // the means of the parameter's gradient and of its square
  AdamW adamw = {};

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
