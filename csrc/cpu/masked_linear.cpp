// masked_linear on the CPU, by panels: a few rows of theta at a time are built in a thread's cache and multiplied at once. theta and
// its gradient never exist in memory; W and M are read once, forward and backward. docs/cpu.md explains the sizes.
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

constexpr int64_t kForwardTile = 128 * 1024, kForwardRow = 64 * 1024, kBackwardTile = 64 * 1024, kBackwardRow = 4096;

// How theta, [out, in], is cut: a panel has `rows` rows; its columns are worked on `columns` at a time, so that a tile of
// rows x columns stays in cache. One scratch a thread.
struct Panels {
  int64_t out, rows, columns, count, threads;

  // tile_bytes: what a tile may take; row_bytes: what one of its rows may take.
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

// `from`, [rows, columns], as T with rows padded by zeros to whole vectors; itself where it is that already.
template <class T>
at::Tensor padded(const at::Tensor& from) {
  const at::Tensor source = from.to(kScalar<T>);
  const int64_t rows = source.size(0), columns = source.size(1), wide = round_up(columns, kRowBytes / int64_t(sizeof(T)));
  if (wide == columns) return source;
  at::Tensor to = at::empty({rows, wide}, source.options());
  const T* in = source.const_data_ptr<T>();
  T* out = to.mutable_data_ptr<T>();
  for (int64_t i = 0; i < rows; ++i) {
    std::copy_n(in + i * columns, columns, out + i * wide);
    std::fill_n(out + i * wide + columns, wide - columns, T(0));
  }
  return to;
}

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

  // work(element of the parameters, element of the tile, number) for each contiguous piece: one where the tile has whole rows without
  // padding, else one a row.
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
    const at::Tensor x = padded<T>(input), b = bias.defined() ? bias.to(kScalar<T>) : bias;
    at::Tensor y = at::empty({batch, out}, x.options());
    if (y.numel() == 0) return y;
    const Panels panels(out, in, batch, sizeof(T), kForwardTile, kForwardRow);
    const int64_t tile_row = round_up(panels.columns, kPad), x_row = x.size(1);
    at::Tensor scratch = at::empty({panels.threads, panels.rows, tile_row}, x.options());
    const T *x_data = x.const_data_ptr<T>(), *b_data = b.defined() ? b.const_data_ptr<T>() : nullptr;
    T *y_data = y.mutable_data_ptr<T>(), *scratch_data = scratch.mutable_data_ptr<T>();
    panels.run([&](int64_t thread, int64_t first, int64_t rows) {
      for (int64_t i = 0; i < batch; ++i) {
        if (b_data != nullptr) std::copy_n(b_data + first, rows, y_data + i * out + first);
        else std::fill_n(y_data + i * out + first, rows, T(0));
      }
      T* theta = scratch_data + thread * panels.rows * tile_row;
      for (int64_t column = 0; column < in; column += panels.columns) {
        const Tile tile{first, rows, column, std::min(panels.columns, in - column), in, tile_row};
        const int64_t wide = round_up(tile.columns, kPad);
        build_theta(tile, theta);
        // The padding meets that of x; what lies there, of another tile, may not be finite.
        for (int64_t i = 0; i < rows; ++i) std::fill_n(theta + i * tile_row + tile.columns, wide - tile.columns, T(0));
        product_kernels<T>().inner(x_data + column, x_row, theta, tile_row, y_data + first, out, batch, rows, wide);
      }
    });
    return y;
  }

  // Gives dx, if it is wanted.
  at::Tensor backward(const at::Tensor& grad, const at::Tensor& input, bool needs_dx, const Sink& dw, const Sink& dm) const {
    const int64_t batch = input.size(0);
    const bool needs_g = dw.wanted() || dm.wanted();
    const at::Tensor dy = grad.to(kScalar<T>), x = padded<T>(input);
    const Panels panels(out, in, batch, sizeof(T), kBackwardTile, kBackwardRow);
    const int64_t tile_row = round_up(panels.columns, kPad), x_row = x.size(1), tile_size = panels.rows * tile_row;
    at::Tensor scratch = at::empty({panels.threads, 2, tile_size}, x.options());
    // Each thread adds to a dx of its own; they are added up in the order of the threads.
    at::Tensor dx = needs_dx ? at::zeros({panels.threads, batch, x_row}, x.options()) : at::Tensor();
    const T *x_data = x.const_data_ptr<T>(), *dy_data = dy.const_data_ptr<T>();
    T *dx_data = needs_dx ? dx.mutable_data_ptr<T>() : nullptr, *scratch_data = scratch.mutable_data_ptr<T>();
    panels.run([&](int64_t thread, int64_t first, int64_t rows) {
      T *g = scratch_data + 2 * thread * tile_size, *theta = g + tile_size;
      for (int64_t column = 0; column < in; column += panels.columns) {
        const Tile tile{first, rows, column, std::min(panels.columns, in - column), in, tile_row};
        const int64_t wide = round_up(tile.columns, kPad);
        if (needs_g) {
          product_kernels<T>().outer(dy_data + first, 1, out, x_data + column, x_row, g, tile_row, rows, batch, wide, false);
          tile.each_piece([&](int64_t element, int64_t at, int64_t n) {
            masked_weight_kernels().backward(gate, param, kType<T>, g + at, at_element(weight, element, bytes),
                                             at_element(mask, element, bytes), needs_dx ? theta + at : nullptr,
                                             at_element(dw, element, bytes), at_element(dm, element, bytes), 0, n);
          });
        } else {
          build_theta(tile, theta);
        }
        if (needs_dx) {
          product_kernels<T>().outer(dy_data + first, out, 1, theta, tile_row, dx_data + thread * batch * x_row + column, x_row,
                                     batch, rows, wide, true);
        }
      }
    });
    if (!needs_dx) return dx;
    dx = panels.threads == 1 ? dx.select(0, 0) : dx.sum(0);
    return x_row == in ? dx : dx.narrow(1, 0, in).contiguous();
  }
};

struct CpuLinear : Cpu {
  static at::Tensor linear(const at::Tensor& x, const at::Tensor& w, const at::Tensor& m, const at::Tensor& b, Gate gate) {
    if (x.scalar_type() == at::kDouble) return Linear<double>{w, m, gate}.forward(x, b);
    return Linear<float>{w, m, gate}.forward(x, b).to(x.scalar_type());
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
