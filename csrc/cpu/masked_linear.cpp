// masked_linear on the CPU, by panels: a few rows of theta at a time are built in a thread's cache and multiplied at once. theta
// and its gradient never exist in memory; W and M are read once, forward and backward. docs/internals/performance.md explains the
// sizes. Each panel passes over all of x and of its gradient, so large batches go through BLAS (cpu/products.h).
#include "ops/masked_linear.h"

#include "cpu/panels.h"
#include "cpu/products.h"

namespace metamask::cpu {
namespace {

// The most that a tile of theta may take, and one of its rows, in bytes.
struct TileBytes {
  int64_t tile, row;
};

// An eighth of the second-level cache: the rows of x that the tile meets, and what streams by, need the rest. W and M are read in
// whole rows where they are not longer than 64 KiB: prefetching stops at the end of a shorter piece.
TileBytes forward_tile() { return {second_level_cache() / 8, 64 * 1024}; }

// Backward has two tiles, theta's and its gradient's, and each panel passes once over dx: the larger that is, the more rows a tile
// needs, at the price of shorter ones. With 1 MiB of cache: 8 rows of up to 16 KiB, or 16 of up to 8 KiB; measured at widths 1024
// to 4096 (docs/internals/performance.md).
TileBytes backward_tile(int64_t batch, int64_t row_bytes) {
  const int64_t cache = second_level_cache();
  const bool few = batch <= 8;
  const int64_t row = std::min(row_bytes, cache / (few ? 64 : 128));
  return {std::max(cache / 16, row * (few ? 8 : 16)), row};
}

template <class T>
struct Linear {
  static constexpr int64_t kPad = kRowBytes / int64_t(sizeof(T));

  const at::Tensor w, m;
  const Gate gate;
  const int64_t out = w.size(0), in = w.size(1), bytes = w.element_size(), mask_bytes = m.element_size();
  const ParamTypes types = types_of(w, m);
  const void *weight = data("weight", w), *mask = data("mask_logits", m);

  void build_theta(const Tile& tile, T* theta) const {
    tile.each_piece([&](int64_t element, int64_t at, int64_t n) {
      masked_weight_kernels().forward(gate, types, kType<T>, at_element(weight, element, bytes),
                                      at_element(mask, element, mask_bytes), theta + at, 0, n);
    });
  }

  at::Tensor forward(const at::Tensor& input, const at::Tensor& bias) const {
    const int64_t batch = input.size(0);
    const Rows<T> x(input);
    const at::Tensor b = bias.defined() ? bias.to(kScalar<T>) : bias;
    at::Tensor y = at::empty({batch, out}, input.options().dtype(kScalar<T>));
    if (y.numel() == 0) return y;
    const TileBytes tiles = forward_tile();
    const Panels panels(out, in, batch, sizeof(T), tiles.tile, tiles.row);
    const int64_t tile_row = round_up(panels.columns, kPad), tile_size = panels.rows * tile_row;
    const T* b_data = data<T>("bias", b);
    T* y_data = mutable_data<T>("y", y);
    panels.run([&](int64_t, int64_t first, int64_t rows) {
      for (int64_t i = 0; i < batch; ++i) {
        if (b_data != nullptr) std::copy_n(b_data + first, rows, y_data + i * out + first);
        else std::fill_n(y_data + i * out + first, rows, T(0));
      }
      T* theta = thread_tiles<T>(tile_size);
      for (int64_t column = 0; column < in; column += panels.columns) {
        const Tile tile{first, rows, column, std::min(panels.columns, in - column), in, tile_row};
        const int64_t wide = round_up(tile.columns, kPad);
        build_theta(tile, theta);
        // The padding meets that of x; what lies there, of another tile, may not be finite.
        for (int64_t i = 0; i < rows; ++i) std::fill_n(theta + i * tile_row + tile.columns, wide - tile.columns, T(0));
        gemm_kernels<T>().gemm_nt(x.data + column, x.row, theta, tile_row, y_data + first, out, batch, rows, wide);
      }
    });
    return y;
  }

  // Returns dx, if it is wanted.
  at::Tensor backward(const at::Tensor& grad, const at::Tensor& input, bool needs_dx, const Sink& dw, const Sink& dm) const {
    const int64_t batch = input.size(0);
    const bool needs_g = dw.wanted() || dm.wanted();
    const at::Tensor dy = grad.scalar_type() == kScalar<T> ? grad : grad.to(kScalar<T>);
    const Rows<T> x(input);
    const TileBytes tiles = backward_tile(batch, in * int64_t(sizeof(T)));
    const Panels panels(out, in, batch, sizeof(T), tiles.tile, tiles.row);
    const int64_t tile_row = round_up(panels.columns, kPad), tile_size = panels.rows * tile_row;
    // Each thread adds to a dx of its own; they are added up in the order of the threads.
    const int64_t dx_size = needs_dx ? batch * x.row : 0;
    const Scratch<T> dx(panels.threads * dx_size);
    std::fill_n(dx.data, panels.threads * dx_size, T(0));
    const T* dy_data = data<T>("grad", dy);
    panels.run([&](int64_t thread, int64_t first, int64_t rows) {
      T *g = thread_tiles<T>(2 * tile_size), *theta = g + tile_size;
      for (int64_t column = 0; column < in; column += panels.columns) {
        const Tile tile{first, rows, column, std::min(panels.columns, in - column), in, tile_row};
        const int64_t wide = round_up(tile.columns, kPad);
        if (needs_g) {
          gemm_kernels<T>().gemm_nn(dy_data + first, 1, out, x.data + column, x.row, g, tile_row, rows, batch, wide, false);
          tile.each_piece([&](int64_t element, int64_t at, int64_t n) {
            masked_weight_kernels().backward(gate, types, kType<T>, g + at, at_element(weight, element, bytes),
                                             at_element(mask, element, mask_bytes), needs_dx ? theta + at : nullptr,
                                             at_element(dw, element, bytes), at_element(dm, element, mask_bytes), 0, n);
          });
        } else {
          build_theta(tile, theta);
        }
        if (needs_dx) {
          gemm_kernels<T>().gemm_nn(dy_data + first, out, 1, theta, tile_row, dx.data + thread * dx_size + column, x.row, batch,
                                    rows, wide, true);
        }
      }
    });
    if (!needs_dx) return at::Tensor();
    at::Tensor total = at::empty({batch, in}, input.options().dtype(kScalar<T>));
    T* total_data = mutable_data<T>("gradient of input", total);
    add_threads(dx.data, panels.threads, batch, x.row, in,
                [&](int64_t i, const T* sum) { std::copy_n(sum, in, total_data + i * in); });
    return total;
  }
};

struct CpuLinear : Cpu {
  // The type in which a product of x is taken.
  static at::ScalarType product_type(const at::Tensor& x) {
    if (x.scalar_type() == at::kBFloat16 && multiplies_bfloat16()) return at::kBFloat16;
    return compute_type(x);
  }

  static at::Tensor linear(const at::Tensor& x, const at::Tensor& w, const at::Tensor& m, const at::Tensor& b, Gate gate) {
    const at::ScalarType type = product_type(x);
    at::Tensor y;
    if (through_blas(Pass::kForward, type, x.size(0), w.size(1), w.size(0))) y = linear_blas(x, w, m, b, gate, type);
    else if (type == at::kDouble) y = Linear<double>{w, m, gate}.forward(x, b);
    else if (type == at::kBFloat16) y = linear_bfloat16(x, w, m, b, gate);
    else y = Linear<float>{w, m, gate}.forward(x, b);
    return type == x.scalar_type() ? y : y.to(x.scalar_type());
  }

  static at::Tensor linear_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& w, const at::Tensor& m, Gate gate,
                                    bool needs_dx, const Sink& dw, const Sink& dm) {
    const at::ScalarType type = product_type(x);
    const bool blas = through_blas(Pass::kBackward, type, x.size(0), w.size(1), w.size(0));
    if (type == at::kBFloat16 && (dw.wanted() || dm.wanted())) {
      return linear_backward_bfloat16(dy, x, w, m, gate, needs_dx, dw, dm, blas);
    }
    if (blas) return linear_backward_blas(dy, x, w, m, gate, type, needs_dx, dw, dm);
    if (type == at::kBFloat16) return linear_backward_bfloat16(dy, x, w, m, gate, needs_dx, dw, dm, false);
    if (type == at::kDouble) return Linear<double>{w, m, gate}.backward(dy, x, needs_dx, dw, dm);
    return Linear<float>{w, m, gate}.backward(dy, x, needs_dx, dw, dm);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(metamask, CPU, library) {
  MaskedLinear<CpuLinear>::register_in(library);
  MaskedLinear<CpuLinear>::register_adamw_in(library);
}

}  // namespace metamask::cpu
