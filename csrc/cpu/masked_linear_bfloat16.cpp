// masked_linear in bfloat16 on processors that multiply it: the panels of masked_linear.cpp, whose tiles of theta are bfloat16, so
// that a product takes half the loads and half the instructions. All sums are float32, and each result is rounded once. theta's
// gradient stays float32.
#include "cpu/kernels/bfloat16.h"
#include "cpu/panels.h"

namespace metamask::cpu {
namespace {

const BFloat16Kernels* bfloat16_kernels() {
#if defined(METAMASK_X86)
  if (capability() == Capability::kAvx512Bf16) return &kBFloat16_avx512_bf16;
#endif
  return nullptr;
}

constexpr int64_t kVector = kRowBytes / int64_t(sizeof(BFloat16));

// Larger tiles than float32's: products this fast pay more for reading x again at each panel. Measured on Zen 5, 1 MiB of L2.
constexpr int64_t kForwardTile = 256 * 1024, kForwardRow = 16 * 1024, kBackwardTile = 128 * 1024, kBackwardRow = 8 * 1024;

// Rows a multiple of 2 KiB apart would fall into a few sets of the first-level cache.
int64_t pitch(int64_t row) { return row % 512 == 0 ? row + kVector : row; }

const BFloat16* bits(const at::BFloat16* data) { return reinterpret_cast<const BFloat16*>(data); }
BFloat16* bits(at::BFloat16* data) { return reinterpret_cast<BFloat16*>(data); }
const Pair* pairs(const BFloat16* row) { return reinterpret_cast<const Pair*>(row); }

struct Linear {
  const at::Tensor w, m;
  const Gate gate;
  const BFloat16Kernels& kernels = *bfloat16_kernels();
  const GemmKernels<Pair, float>& product = gemm_table().bfloat16;
  const int64_t out = w.size(0), in = w.size(1), bytes = w.element_size(), mask_bytes = m.element_size();
  const ParamTypes types = types_of(w, m);
  const void *weight = data("weight", w), *mask = data("mask_logits", m);

  void build_theta(const Tile& tile, BFloat16* theta) const {
    tile.each_piece([&](int64_t element, int64_t at, int64_t n) {
      kernels.theta(gate, types, at_element(weight, element, bytes), at_element(mask, element, mask_bytes), theta + at, n);
    });
  }

  at::Tensor forward(const at::Tensor& input, const at::Tensor& bias) const {
    const int64_t batch = input.size(0);
    const Rows<at::BFloat16> x(input);
    at::Tensor y = at::empty({batch, out}, input.options());
    if (y.numel() == 0) return y;
    const Panels panels(out, in, batch, sizeof(BFloat16), kForwardTile, kForwardRow);
    const int64_t tile_row = round_up(panels.columns, kVector), tile_size = panels.rows * tile_row;
    const int64_t sums_size = batch * round_up(panels.rows, kRowBytes / int64_t(sizeof(float)));
    const Scratch<float> sums_scratch(panels.threads * sums_size);
    const at::BFloat16* b = data<at::BFloat16>("bias", bias);
    BFloat16* y_data = bits(mutable_data<at::BFloat16>("y", y));
    panels.run([&](int64_t thread, int64_t first, int64_t rows) {
      BFloat16* theta = thread_tiles<BFloat16>(tile_size);
      float* sums = sums_scratch.data + thread * sums_size;
      for (int64_t i = 0; i < batch; ++i) {
        for (int64_t j = 0; j < rows; ++j) sums[i * rows + j] = b != nullptr ? widen(bits(b)[first + j]) : 0.0f;
      }
      for (int64_t column = 0; column < in; column += panels.columns) {
        const Tile tile{first, rows, column, std::min(panels.columns, in - column), in, tile_row};
        const int64_t wide = round_up(tile.columns, kVector);
        build_theta(tile, theta);
        // The padding meets that of x; what lies there, of another tile, may not be finite.
        for (int64_t i = 0; i < rows; ++i) std::fill_n(theta + i * tile_row + tile.columns, wide - tile.columns, BFloat16{0});
        product.gemm_nt(pairs(bits(x.data) + column), x.row / 2, pairs(theta), tile_row / 2, sums, rows, batch, rows, wide / 2);
      }
      for (int64_t i = 0; i < batch; ++i) kernels.round(sums + i * rows, y_data + i * out + first, rows);
    });
    return y;
  }

  // Returns dx, if it is wanted. Through BLAS, a panel's theta goes to memory instead of being multiplied; theta's gradient is that
  // of panels all the same, because BLAS would round it.
  at::Tensor backward(const at::Tensor& grad, const at::Tensor& input, bool wants_dx, const Sink& dw, const Sink& dm,
                      bool blas) const {
    const at::Tensor whole = wants_dx && blas ? at::empty({out, in}, input.options()) : at::Tensor();
    BFloat16* whole_data = blas && wants_dx ? bits(mutable_data<at::BFloat16>("theta", whole)) : nullptr;
    const bool needs_dx = wants_dx && !blas;
    const int64_t batch = input.size(0), batch_pairs = (batch + 1) / 2;
    const bool needs_g = dw.wanted() || dm.wanted();
    const Rows<at::BFloat16> dy(grad), x(input);
    const Panels panels(out, in, batch, sizeof(BFloat16), kBackwardTile, kBackwardRow);
    const int64_t tile_row = pitch(round_up(panels.columns, kVector)), tile_size = round_up(panels.rows, 2) * tile_row;
    const int64_t dy_row = round_up(panels.rows, kVector), wide_row = pitch(x.row);
    // A thread's tiles: theta's gradient, theta, and theta's rows by pairs; with them the panel's dy by pairs of rows.
    const Scratch<Pair> dy_scratch(panels.threads * batch_pairs * dy_row);
    const Scratch<Pair> x_pairs(needs_g ? batch_pairs * wide_row : 0);
    if (needs_g) kernels.pair_rows(bits(x.data), x.row, batch, x.row, x_pairs.data, wide_row);
    // Each thread adds to a dx of its own; they are added up in the order of the threads.
    const int64_t dx_size = needs_dx ? batch * wide_row : 0;
    const Scratch<float> dx(panels.threads * dx_size);
    std::fill_n(dx.data, panels.threads * dx_size, 0.0f);
    panels.run([&](int64_t thread, int64_t first, int64_t rows) {
      float* g = thread_tiles<float>(2 * tile_size);
      BFloat16* theta = reinterpret_cast<BFloat16*>(g + tile_size);
      Pair *theta_pairs = reinterpret_cast<Pair*>(theta + tile_size), *dy_pairs = dy_scratch.data + thread * batch_pairs * dy_row;
      const BFloat16* dy_panel = bits(dy.data) + first;
      if (needs_g) kernels.pair_rows(dy_panel, dy.row, batch, rows, dy_pairs, dy_row);
      for (int64_t column = 0; column < in; column += panels.columns) {
        const Tile tile{first, rows, column, std::min(panels.columns, in - column), in, tile_row};
        const int64_t wide = round_up(tile.columns, kVector);
        if (needs_g) {
          product.gemm_nn(dy_pairs, 1, dy_row, x_pairs.data + column, wide_row, g, tile_row, rows, batch_pairs, wide, false);
          tile.each_piece([&](int64_t element, int64_t at, int64_t n) {
            kernels.backward(gate, types, g + at, at_element(weight, element, bytes), at_element(mask, element, mask_bytes),
                             whole_data != nullptr ? whole_data + element
                             : needs_dx            ? theta + at
                                                   : nullptr,
                             at_element(dw, element, bytes), at_element(dm, element, mask_bytes), n);
          });
        } else {
          build_theta(tile, theta);
        }
        if (needs_dx) {
          kernels.pair_rows(theta, tile_row, rows, wide, theta_pairs, tile_row);
          product.gemm_nn(pairs(dy_panel), dy.row / 2, 1, theta_pairs, tile_row, dx.data + thread * dx_size + column, wide_row,
                          batch, (rows + 1) / 2, wide, true);
        }
      }
    });
    if (whole.defined()) return at::mm(grad, whole);
    if (!needs_dx) return at::Tensor();
    at::Tensor total = at::empty({batch, in}, input.options());
    BFloat16* total_data = bits(mutable_data<at::BFloat16>("gradient of input", total));
    add_threads(dx.data, panels.threads, batch, wide_row, in,
                [&](int64_t i, const float* sum) { kernels.round(sum, total_data + i * in, in); });
    return total;
  }
};

}  // namespace

bool multiplies_bfloat16() { return bfloat16_kernels() != nullptr; }

at::Tensor linear_bfloat16(const at::Tensor& x, const at::Tensor& w, const at::Tensor& m, const at::Tensor& b, Gate gate) {
  return Linear{w, m, gate}.forward(x, b);
}

at::Tensor linear_backward_bfloat16(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& w, const at::Tensor& m, Gate gate,
                                    bool needs_dx, const Sink& dw, const Sink& dm, bool blas) {
  return Linear{w, m, gate}.backward(dy, x, needs_dx, dw, dm, blas);
}

}  // namespace metamask::cpu
