// masked_linear on the CPU, by panels: a few rows of theta at a time are built in a thread's cache and multiplied at once. theta
// and its gradient never exist in memory; W and M are read once, forward and backward. docs/cpu.md explains the sizes.
#include "../masked_linear.h"

#include <unistd.h>

#include <algorithm>

#include "masked_weight.h"
#include "product_kernel.h"

namespace metamask::cpu {
namespace {

int64_t second_level_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 0);
  if (bytes > 0) return bytes;
#endif
  return int64_t(1) << 20;
}

const Products& products() {
#if defined(METAMASK_X86)
  switch (capability()) {
    case Capability::kAvx512: return kProducts_avx512;
    case Capability::kAvx2: return kProducts_avx2;
    default: break;
  }
#endif
  return kProducts_default;
}

template <class T>
const ProductKernels<T>& product_kernels() {
  if constexpr (sizeof(T) == 8) return products().float64;
  else return products().float32;
}

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// A tile of theta takes an eighth of the second-level cache: the rows of x that it meets, and what streams by, need the rest.
// Backward has two tiles, theta's and its gradient's.
int64_t forward_tile() { return second_level_cache() / 8; }
int64_t backward_tile() { return second_level_cache() / 16; }
// Forward, W and M are read in whole rows where they are not longer than this: prefetching stops at the end of a shorter piece.
// Backward, a tile needs many rows, because each panel passes once over dx.
constexpr int64_t kForwardRow = 64 * 1024, kBackwardRow = 4 * 1024;

// How theta, [out, in], is cut: a panel has `rows` rows; its columns are worked on `columns` at a time, so that a tile of
// rows x columns stays in cache. One scratch a thread.
struct Panels {
  int64_t out, rows, columns, count, threads;

  Panels(int64_t out, int64_t in, int64_t batch, int64_t element, int64_t tile_bytes, int64_t row_bytes) : out(out) {
    columns = std::clamp<int64_t>(row_bytes / element, 1, std::max<int64_t>(in, 1));
    const int64_t fits = std::max<int64_t>(tile_bytes / (columns * element), 1);
    // Below about 10 microseconds of work, waking another thread costs more than it does.
    const double nanoseconds = double(out) * double(in) * (0.25 + 0.01 * double(batch));
    const int64_t pool = at::in_parallel_region() || nanoseconds < 10000 ? 1 : at::get_num_threads();
    // Several panels for each thread, so that a late one costs little.
    const int64_t share = pool > 1 ? (out + 4 * pool - 1) / (4 * pool) : out;
    rows = std::clamp<int64_t>(round_up(std::min(fits, share), 4), 4, std::max<int64_t>(out, 4));
    count = (out + rows - 1) / rows;
    threads = std::min(pool, std::max<int64_t>(count, 1));
  }

  // work(thread, first row, number of rows) for every panel; the division among threads depends on their number only.
  template <class Work>
  void run(const Work& work) const {
    const auto some = [&](int64_t thread, int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) work(thread, panel * rows, std::min(rows, out - panel * rows));
    };
    if (threads == 1) return some(0, 0, count);
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { some(at::get_thread_num(), begin, end); });
  }
};

template <class T>
constexpr at::ScalarType kScalar = sizeof(T) == 8 ? at::kDouble : at::kFloat;
template <class T>
constexpr Type kType = sizeof(T) == 8 ? Type::kFloat64 : Type::kFloat32;

// Uninitialised memory: of a small layer on the stack, because torch's allocator takes as long as its arithmetic.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) {
    if (n <= kSmall) return;
    large_ = at::empty({n}, at::TensorOptions().dtype(kScalar<T>));
    data = large_.template mutable_data_ptr<T>();
  }
  Scratch(const Scratch&) = delete;

 private:
  static constexpr int64_t kSmall = 16 * 1024 / int64_t(sizeof(T));
  at::Tensor large_;
  alignas(64) T small_[kSmall];

 public:
  T* data = small_;
};

// A contiguous matrix as T, its rows padded by zeros to whole vectors; the matrix itself where it is that already.
template <class T>
class Rows {
 public:
  explicit Rows(const at::Tensor& from)
      : source_(from.scalar_type() == kScalar<T> ? from : from.to(kScalar<T>)),
        row(round_up(from.size(1), kRowBytes / int64_t(sizeof(T)))),
        copy_(row == from.size(1) ? 0 : from.size(0) * row) {
    const int64_t rows = from.size(0), columns = from.size(1);
    data = source_.template const_data_ptr<T>();
    if (row == columns) return;
    for (int64_t i = 0; i < rows; ++i) {
      std::copy_n(data + i * columns, columns, copy_.data + i * row);
      std::fill_n(copy_.data + i * row + columns, row - columns, T(0));
    }
    data = copy_.data;
  }

 private:
  at::Tensor source_;

 public:
  const T* data;
  const int64_t row;

 private:
  Scratch<T> copy_;
};

// A parameter of 1, 2, 4 or 8 bytes an element, from one of its elements on.
template <class Pointer>
Pointer at_element(Pointer base, int64_t element, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return base == nullptr ? nullptr : static_cast<Byte*>(base) + element * bytes;
}

Sink at_element(const Sink& sink, int64_t element, int64_t bytes) {
  Sink moved = sink;
  moved.gradient = at_element(sink.gradient, element, bytes);
  moved.parameter = at_element(sink.parameter, element, bytes);
  moved.velocity = at_element(sink.velocity, element, bytes);
  return moved;
}

// theta's tile, or its gradient's: `rows` x `columns` of the parameters from (first, column) on, in scratch rows of `tile_row`.
struct Tile {
  int64_t first, rows, column, columns, in, tile_row;

  // work(element of the parameters, element of the tile, number) for each contiguous piece: one where the tile has whole rows
  // without padding, else one a row.
  template <class Work>
  void each_piece(const Work& work) const {
    if (columns == in && tile_row == in) return work(first * in, 0, rows * in);
    for (int64_t i = 0; i < rows; ++i) work((first + i) * in + column, i * tile_row, columns);
  }
};

template <class T>
struct Linear {
  static constexpr int64_t kPad = kRowBytes / int64_t(sizeof(T));

  const at::Tensor w, m;
  const Gate gate;
  const int64_t out = w.size(0), in = w.size(1), bytes = w.element_size();
  const Type param = type_of(w.scalar_type());
  const void *weight = w.const_data_ptr(), *mask = m.const_data_ptr();

  void build_theta(const Tile& tile, T* theta) const {
    tile.each_piece([&](int64_t element, int64_t at, int64_t n) {
      masked_weight_kernels().forward(gate, param, kType<T>, at_element(weight, element, bytes), at_element(mask, element, bytes),
                                      theta + at, 0, n);
    });
  }

  at::Tensor forward(const at::Tensor& input, const at::Tensor& bias) const {
    const int64_t batch = input.size(0);
    const Rows<T> x(input);
    const at::Tensor b = bias.defined() ? bias.to(kScalar<T>) : bias;
    at::Tensor y = at::empty({batch, out}, input.options().dtype(kScalar<T>));
    if (y.numel() == 0) return y;
    const Panels panels(out, in, batch, sizeof(T), forward_tile(), kForwardRow);
    const int64_t tile_row = round_up(panels.columns, kPad), tile_size = panels.rows * tile_row;
    const Scratch<T> scratch(panels.threads * tile_size);
    const T* b_data = b.defined() ? b.const_data_ptr<T>() : nullptr;
    T* y_data = y.mutable_data_ptr<T>();
    panels.run([&](int64_t thread, int64_t first, int64_t rows) {
      for (int64_t i = 0; i < batch; ++i) {
        if (b_data != nullptr) std::copy_n(b_data + first, rows, y_data + i * out + first);
        else std::fill_n(y_data + i * out + first, rows, T(0));
      }
      T* theta = scratch.data + thread * tile_size;
      for (int64_t column = 0; column < in; column += panels.columns) {
        const Tile tile{first, rows, column, std::min(panels.columns, in - column), in, tile_row};
        const int64_t wide = round_up(tile.columns, kPad);
        build_theta(tile, theta);
        // The padding meets that of x; what lies there, of another tile, may not be finite.
        for (int64_t i = 0; i < rows; ++i) std::fill_n(theta + i * tile_row + tile.columns, wide - tile.columns, T(0));
        product_kernels<T>().inner(x.data + column, x.row, theta, tile_row, y_data + first, out, batch, rows, wide);
      }
    });
    return y;
  }

  // Gives dx, if it is wanted.
  at::Tensor backward(const at::Tensor& grad, const at::Tensor& input, bool needs_dx, const Sink& dw, const Sink& dm) const {
    const int64_t batch = input.size(0);
    const bool needs_g = dw.wanted() || dm.wanted();
    const at::Tensor dy = grad.scalar_type() == kScalar<T> ? grad : grad.to(kScalar<T>);
    const Rows<T> x(input);
    const Panels panels(out, in, batch, sizeof(T), backward_tile(), kBackwardRow);
    const int64_t tile_row = round_up(panels.columns, kPad), tile_size = panels.rows * tile_row;
    const Scratch<T> scratch(panels.threads * 2 * tile_size);
    // Each thread adds to a dx of its own; they are added up in the order of the threads.
    const int64_t dx_size = needs_dx ? batch * x.row : 0;
    const Scratch<T> dx(panels.threads * dx_size);
    std::fill_n(dx.data, panels.threads * dx_size, T(0));
    const T* dy_data = dy.const_data_ptr<T>();
    panels.run([&](int64_t thread, int64_t first, int64_t rows) {
      T *g = scratch.data + 2 * thread * tile_size, *theta = g + tile_size;
      for (int64_t column = 0; column < in; column += panels.columns) {
        const Tile tile{first, rows, column, std::min(panels.columns, in - column), in, tile_row};
        const int64_t wide = round_up(tile.columns, kPad);
        if (needs_g) {
          product_kernels<T>().outer(dy_data + first, 1, out, x.data + column, x.row, g, tile_row, rows, batch, wide, false);
          tile.each_piece([&](int64_t element, int64_t at, int64_t n) {
            masked_weight_kernels().backward(gate, param, kType<T>, g + at, at_element(weight, element, bytes),
                                             at_element(mask, element, bytes), needs_dx ? theta + at : nullptr,
                                             at_element(dw, element, bytes), at_element(dm, element, bytes), 0, n);
          });
        } else {
          build_theta(tile, theta);
        }
        if (needs_dx) {
          product_kernels<T>().outer(dy_data + first, out, 1, theta, tile_row, dx.data + thread * dx_size + column, x.row, batch,
                                     rows, wide, true);
        }
      }
    });
    if (!needs_dx) return at::Tensor();
    at::Tensor total = at::empty({batch, in}, input.options().dtype(kScalar<T>));
    T* total_data = total.mutable_data_ptr<T>();
    const auto add_up = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::copy_n(dx.data + i * x.row, in, total_data + i * in);
        for (int64_t thread = 1; thread < panels.threads; ++thread) {
          const T* more = dx.data + thread * dx_size + i * x.row;
          for (int64_t k = 0; k < in; ++k) total_data[i * in + k] += more[k];
        }
      }
    };
    if (panels.threads == 1) add_up(0, batch);
    else at::parallel_for(0, batch, std::max<int64_t>(kGrain / std::max<int64_t>(in, 1), 1), add_up);
    return total;
  }
};

struct CpuLinear : Cpu {
  static at::Tensor linear(const at::Tensor& x, const at::Tensor& w, const at::Tensor& m, const at::Tensor& b, Gate gate) {
    if (x.scalar_type() == at::kDouble) return Linear<double>{w, m, gate}.forward(x, b);
    const at::Tensor y = Linear<float>{w, m, gate}.forward(x, b);
    return x.scalar_type() == at::kFloat ? y : y.to(x.scalar_type());
  }

  static at::Tensor linear_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& w, const at::Tensor& m, Gate gate,
                                    bool needs_dx, const Sink& dw, const Sink& dm) {
    if (x.scalar_type() == at::kDouble) return Linear<double>{w, m, gate}.backward(dy, x, needs_dx, dw, dm);
    return Linear<float>{w, m, gate}.backward(dy, x, needs_dx, dw, dm);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(metamask, CPU, library) { MaskedLinear<CpuLinear>::register_in(library); }

}  // namespace metamask::cpu
