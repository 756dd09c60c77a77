// Compiled once for each instruction set (cpu/kernels/isa.h).
#include "cpu/kernels/masked_weight.h"

namespace metamask::cpu {
namespace {

constexpr int64_t kBlock = 512;  // elements worked on at a time: a dozen arrays of them stay in the first-level cache

// Conversions between an array and a block of floats in cache, aligned to a vector. The first is a call: inlined at each use it was
// a third of the code. The second is not: as a call it made a backward in bfloat16 1.05 as slow.
template <class S>
__attribute__((noinline)) void widen_block(const S* __restrict from, float* __restrict to, int64_t n) {
  to = static_cast<float*>(__builtin_assume_aligned(to, 64));
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

template <class S>
METAMASK_INLINE void narrow_block(const float* __restrict from, S* __restrict to, int64_t n) {
  from = static_cast<const float*>(__builtin_assume_aligned(from, 64));
  for (int64_t i = 0; i < n; ++i) narrow(from[i], to[i]);
}

// A block of an array in the type of the arithmetic: the array itself where it has that type, else a converted copy.
template <class T>
class Input {
 public:
  Input(Type type, const void* data) : type_(type), data_(data) {}

  const T* block(int64_t begin, int64_t n) {
    if (data_ == nullptr) {
      for (int64_t i = 0; i < n; ++i) copy_[i] = T(0);
      return copy_;
    }
    if constexpr (sizeof(T) == sizeof(float)) {
      switch (type_) {
        case Type::kBFloat16: widen_block(static_cast<const BFloat16*>(data_) + begin, copy_, n); return copy_;
        case Type::kFloat16: widen_block(static_cast<const Float16*>(data_) + begin, copy_, n); return copy_;
        default: break;
      }
    }
    return static_cast<const T*>(data_) + begin;
  }

 private:
  Type type_;
  const void* data_;
  alignas(64) T copy_[kBlock];
};

template <class T>
class Output {
 public:
  Output(Type type, void* data) : type_(type), data_(data) {}

  T* block(int64_t begin) {
    const bool direct = data_ != nullptr && type_ == (sizeof(T) == 8 ? Type::kFloat64 : Type::kFloat32);
    return direct ? static_cast<T*>(data_) + begin : copy_;
  }

  void finish(int64_t begin, int64_t n) {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (data_ == nullptr) return;
      if (type_ == Type::kBFloat16) narrow_block(copy_, static_cast<BFloat16*>(data_) + begin, n);
      if (type_ == Type::kFloat16) narrow_block(copy_, static_cast<Float16*>(data_) + begin, n);
    }
  }

 private:
  Type type_;
  void* data_;
  alignas(64) T copy_[kBlock];
};

// An array that a step reads and writes.
template <class T>
class State {
 public:
  State(Type type, void* data) : in_(type, data), out_(type, data) {}

  const T* from(int64_t begin, int64_t n) { return in_.block(begin, n); }
  T* to(int64_t begin) { return out_.block(begin); }
  void finish(int64_t begin, int64_t n) { out_.finish(begin, n); }

 private:
  Input<T> in_;
  Output<T> out_;
};

// Takes one step along a block of gradients: changes the parameter that `p` was read from, and what the optimiser keeps of it.
template <class T>
class Descent {
 public:
  // `first` is the momentum buffer, or AdamW's mean of gradients.
  Descent(Type type, const Sink& sink)
      : sink_(sink),
        first_(type, sink.exp_avg != nullptr ? sink.exp_avg : sink.momentum_buffer),
        exp_avg_sq_(type, sink.exp_avg_sq),
        out_(type, sink.parameter) {}

  void run(const T* p, const T* g, int64_t begin, int64_t n) {
    if (sink_.parameter == nullptr) return;
    T* to = out_.block(begin);
    if (sink_.exp_avg != nullptr) adamw(p, g, to, begin, n);
    else sgd(p, g, to, begin, n);
    out_.finish(begin, n);
  }

 private:
  void sgd(const T* p, const T* g, T* to, int64_t begin, int64_t n) {
    const Sgd sgd = sink_.sgd;
    if (sink_.momentum_buffer == nullptr) {
      // Works in place, element by element: `to` is the same array as `p`, or apart from it.
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        T momentum_buffer = T(0);
        to[i] = descend(p[i], g[i], sgd, momentum_buffer);
      }
    } else {
      const T* momentum_buffer_from = first_.from(begin, n);
      T* momentum_buffer_to = first_.to(begin);
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        T momentum_buffer = momentum_buffer_from[i];
        to[i] = descend(p[i], g[i], sgd, momentum_buffer);
        momentum_buffer_to[i] = momentum_buffer;
      }
      first_.finish(begin, n);
    }
  }

  void adamw(const T* p, const T* g, T* to, int64_t begin, int64_t n) {
    const AdamW adamw = sink_.adamw;
    const T *mean_from = first_.from(begin, n), *square_from = exp_avg_sq_.from(begin, n);
    T *mean_to = first_.to(begin), *square_to = exp_avg_sq_.to(begin);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      T mean = mean_from[i], square = square_from[i];
      to[i] = descend(p[i], g[i], adamw, mean, square);
      mean_to[i] = mean;
      square_to[i] = square;
    }
    first_.finish(begin, n);
    exp_avg_sq_.finish(begin, n);
  }

  Sink sink_;
  State<T> first_, exp_avg_sq_;
  Output<T> out_;
};

template <class T, GateKind kind>
void forward_block(T gate_param, const T* __restrict w, const T* __restrict m, T* __restrict theta, int64_t n) {
  for (int64_t i = 0; i < n; ++i) theta[i] = theta_of<kind>(w[i], m[i], gate_param);
}

template <class T, GateKind kind>
void backward_block(T gate_param, const T* __restrict g, const T* __restrict w, const T* __restrict m, T* __restrict theta,
                    T* __restrict dw, T* __restrict dm, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const auto out = backward_of<kind>(g[i], w[i], m[i], gate_param);
    theta[i] = out.theta;
    dw[i] = out.w;
    dm[i] = out.m;
  }
}

template <class T, GateKind kind>
void double_backward_block(T gate_param, const T* __restrict a, const T* __restrict b, const T* __restrict g, const T* __restrict w,
                           const T* __restrict m, T* __restrict dg, T* __restrict dw, T* __restrict dm, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const auto out = double_backward_of<kind>(a[i], b[i], g[i], w[i], m[i], gate_param);
    dg[i] = out.g;
    dw[i] = out.w;
    dm[i] = out.m;
  }
}

template <class T, GateKind kind>
void backward_add_block(T gate_param, const T* __restrict g, const T* __restrict w, const T* __restrict m, T* __restrict theta,
                        T* __restrict dw, T* __restrict dm, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const auto out = backward_of<kind>(g[i], w[i], m[i], gate_param);
    theta[i] = out.theta;
    dw[i] += out.w;
    dm[i] = out.m;
  }
}

template <class T, GateKind kind>
void second_backward_add_block(T gate_param, const T* __restrict a, const T* __restrict b, const T* __restrict g,
                               const T* __restrict h, const T* __restrict w, const T* __restrict m, T* __restrict theta,
                               T* __restrict c, T* __restrict dw, T* __restrict dm, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    // The compiler evaluates the gate once.
    const auto out = backward_of<kind>(h[i], w[i], m[i], gate_param);
    const auto second = double_backward_of<kind>(a[i], b[i], g[i], w[i], m[i], gate_param);
    theta[i] = out.theta;
    c[i] = second.g;
    dw[i] += second.w + out.w;
    dm[i] = second.m + out.m;
  }
}

template <class T, GateKind kind>
void forward_range(Gate gate, ParamTypes types, Type out, const void* w, const void* m, void* theta, int64_t begin, int64_t end) {
  Input<T> w_in(types.weight, w), m_in(types.mask, m);
  Output<T> theta_out(out, theta);
  for (int64_t i = begin, n; i < end; i += n) {
    n = end - i < kBlock ? end - i : kBlock;
    forward_block<T, kind>(gate_param_of<T>(gate), w_in.block(i, n), m_in.block(i, n), theta_out.block(i), n);
    theta_out.finish(i, n);
  }
}

template <class T, GateKind kind>
void backward_range(Gate gate, ParamTypes types, Type grad, const void* g, const void* w, const void* m, void* theta,
                    const Sink& dw, const Sink& dm, int64_t begin, int64_t end) {
  Input<T> g_in(grad, g), w_in(types.weight, w), m_in(types.mask, m);
  Output<T> theta_out(grad, theta), dw_out(types.weight, dw.gradient), dm_out(types.mask, dm.gradient);
  Descent<T> w_step(types.weight, dw), m_step(types.mask, dm);
  for (int64_t i = begin, n; i < end; i += n) {
    n = end - i < kBlock ? end - i : kBlock;
    const T *w_block = w_in.block(i, n), *m_block = m_in.block(i, n);
    T *dw_block = dw_out.block(i), *dm_block = dm_out.block(i);
    backward_block<T, kind>(gate_param_of<T>(gate), g_in.block(i, n), w_block, m_block, theta_out.block(i), dw_block, dm_block, n);
    theta_out.finish(i, n);
    dw_out.finish(i, n);
    dm_out.finish(i, n);
    w_step.run(w_block, dw_block, i, n);
    m_step.run(m_block, dm_block, i, n);
  }
}

template <class T, GateKind kind>
void double_backward_range(Gate gate, ParamTypes types, Type grad, const void* a, const void* b, const void* g, const void* w,
                           const void* m, void* dg, void* dw, void* dm, int64_t begin, int64_t end) {
  Input<T> a_in(types.weight, a), b_in(types.mask, b), g_in(grad, g), w_in(types.weight, w), m_in(types.mask, m);
  Output<T> dg_out(grad, dg), dw_out(types.weight, dw), dm_out(types.mask, dm);
  for (int64_t i = begin, n; i < end; i += n) {
    n = end - i < kBlock ? end - i : kBlock;
    double_backward_block<T, kind>(gate_param_of<T>(gate), a_in.block(i, n), b_in.block(i, n), g_in.block(i, n), w_in.block(i, n),
                                   m_in.block(i, n), dg_out.block(i), dw_out.block(i), dm_out.block(i), n);
    dg_out.finish(i, n);
    dw_out.finish(i, n);
    dm_out.finish(i, n);
  }
}

// An array of sums. If none is wanted, the sums go to a block that nobody reads.
template <class T>
class Sums {
 public:
  explicit Sums(void* data) : data_(static_cast<T*>(data)) {
    if (data_ == nullptr) {
      for (int64_t i = 0; i < kBlock; ++i) copy_[i] = T(0);
    }
  }

  T* block(int64_t begin) { return data_ == nullptr ? copy_ : data_ + begin; }

 private:
  T* data_;
  alignas(64) T copy_[kBlock];
};

template <class T>
constexpr Type kType = sizeof(T) == 8 ? Type::kFloat64 : Type::kFloat32;

template <class T, GateKind kind>
void backward_add_range(Gate gate, ParamTypes types, const void* g, const void* w, const void* m, void* theta, void* dw, void* dm,
                        int64_t count) {
  Input<T> g_in(kType<T>, g), w_in(types.weight, w), m_in(types.mask, m);
  Output<T> theta_out(kType<T>, theta), dm_out(types.mask, dm);
  Sums<T> dw_sums(dw);
  for (int64_t i = 0, n; i < count; i += n) {
    n = count - i < kBlock ? count - i : kBlock;
    backward_add_block<T, kind>(gate_param_of<T>(gate), g_in.block(i, n), w_in.block(i, n), m_in.block(i, n), theta_out.block(i),
                                dw_sums.block(i), dm_out.block(i), n);
    dm_out.finish(i, n);
  }
}

template <class T, GateKind kind>
void second_backward_add_range(Gate gate, ParamTypes types, const void* a, const void* b, const void* g, const void* h,
                               const void* w, const void* m, void* theta, void* c, void* dw, void* dm, int64_t count) {
  Input<T> a_in(types.weight, a), b_in(types.mask, b), g_in(kType<T>, g), h_in(kType<T>, h), w_in(types.weight, w),
      m_in(types.mask, m);
  Output<T> theta_out(kType<T>, theta), c_out(kType<T>, c), dm_out(types.mask, dm);
  Sums<T> dw_sums(dw);
  for (int64_t i = 0, n; i < count; i += n) {
    n = count - i < kBlock ? count - i : kBlock;
    second_backward_add_block<T, kind>(gate_param_of<T>(gate), a_in.block(i, n), b_in.block(i, n), g_in.block(i, n),
                                       h_in.block(i, n), w_in.block(i, n), m_in.block(i, n), theta_out.block(i), c_out.block(i),
                                       dw_sums.block(i), dm_out.block(i), n);
    dm_out.finish(i, n);
  }
}

// Calls RANGE<type of the arithmetic, gate>.
#define DISPATCH(RANGE, gate, types, ...)                                                             \
  if (types.weight == Type::kFloat64) {                                                               \
    gate.kind == kSigmoid ? RANGE<double, kSigmoid>(__VA_ARGS__) : RANGE<double, kHard>(__VA_ARGS__); \
  } else {                                                                                            \
    gate.kind == kSigmoid ? RANGE<float, kSigmoid>(__VA_ARGS__) : RANGE<float, kHard>(__VA_ARGS__);   \
  }

// Of what task_masked_linear calls, which has one gate more.
#define DISPATCH_ANY(RANGE, gate, types, ...)  \
  if (gate.kind != kIdentity) {                \
    DISPATCH(RANGE, gate, types, __VA_ARGS__)  \
  } else if (types.weight == Type::kFloat64) { \
    RANGE<double, kIdentity>(__VA_ARGS__);     \
  } else {                                     \
    RANGE<float, kIdentity>(__VA_ARGS__);      \
  }

void forward(Gate gate, ParamTypes types, Type out, const void* w, const void* m, void* theta, int64_t begin, int64_t end) {
  DISPATCH_ANY(forward_range, gate, types, gate, types, out, w, m, theta, begin, end)
}

void backward(Gate gate, ParamTypes types, Type grad, const void* g, const void* w, const void* m, void* theta, Sink dw, Sink dm,
              int64_t begin, int64_t end) {
  DISPATCH(backward_range, gate, types, gate, types, grad, g, w, m, theta, dw, dm, begin, end)
}

void double_backward(Gate gate, ParamTypes types, Type grad, const void* a, const void* b, const void* g, const void* w,
                     const void* m, void* dg, void* dw, void* dm, int64_t begin, int64_t end) {
  DISPATCH(double_backward_range, gate, types, gate, types, grad, a, b, g, w, m, dg, dw, dm, begin, end)
}

void backward_add(Gate gate, ParamTypes types, const void* g, const void* w, const void* m, void* theta, void* dw, void* dm,
                  int64_t n) {
  DISPATCH_ANY(backward_add_range, gate, types, gate, types, g, w, m, theta, dw, dm, n)
}

void second_backward_add(Gate gate, ParamTypes types, const void* a, const void* b, const void* g, const void* h, const void* w,
                         const void* m, void* theta, void* c, void* dw, void* dm, int64_t n) {
  DISPATCH_ANY(second_backward_add_range, gate, types, gate, types, a, b, g, h, w, m, theta, c, dw, dm, n)
}

}  // namespace

const MaskedWeightKernels METAMASK_TABLE(kMaskedWeight) = {&forward, &backward, &double_backward, &backward_add,
                                                           &second_backward_add};

}  // namespace metamask::cpu
