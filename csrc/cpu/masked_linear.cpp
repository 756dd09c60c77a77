// masked_linear on the CPU, by panels: a few rows of theta at a time are built in a thread's second-level cache and multiplied at
// once. theta and its gradient never exist in memory; W and M are read once, forward and backward.
#include "../masked_linear.h"

#include <unistd.h>

#include <algorithm>

#include "masked_weight.h"

namespace metamask::cpu {
namespace {

int64_t second_level_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 0);
  if (bytes > 0) return bytes;
#endif
  return int64_t(1) << 20;
}

// How the rows of theta are cut: `rows` to a panel, one scratch a thread.
struct Panels {
  int64_t rows, count, threads;

  // All scratch of a panel (row_bytes for each row) fits half the second-level cache, which leaves the other half to the operands
  // that stream by; each thread gets several panels, so that a late one costs little; 256 rows are enough for a product to run at
  // speed.
  Panels(int64_t total, int64_t row_bytes) {
    const int64_t fits = second_level_cache() / 2 / std::max<int64_t>(row_bytes, 1);
    const int64_t pool = at::in_parallel_region() ? 1 : at::get_num_threads();
    const int64_t shared = (total + 2 * pool - 1) / (2 * pool);
    rows = std::min(total, std::clamp<int64_t>(std::min(fits, shared) / 16 * 16, 16, 256));
    // What one thread can do in the time of waking another stays in one piece.
    if (total * row_bytes <= 64 * 1024) rows = total;
    count = rows > 0 ? (total + rows - 1) / rows : 0;
    threads = std::min(pool, std::max<int64_t>(count, 1));
  }

  // work(thread, first row, number of rows) for every panel; the division among threads depends on their number only.
  template <class Work>
  void run(int64_t total, const Work& work) const {
    if (count == 1) return work(0, 0, total);
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      // The caller's guards do not reach the threads of the pool.
      const at::AutoDispatchBelowADInplaceOrView below;
      for (int64_t panel = begin; panel < end; ++panel) {
        work(threads == 1 ? 0 : at::get_thread_num(), panel * rows, std::min(rows, total - panel * rows));
      }
    });
  }
};

const char* at_element(const at::Tensor& tensor, int64_t element) {
  return static_cast<const char*>(tensor.const_data_ptr()) + element * tensor.element_size();
}

char* at_element(at::Tensor& tensor, int64_t element) {
  return tensor.defined() ? static_cast<char*>(tensor.mutable_data_ptr()) + element * tensor.element_size() : nullptr;
}

struct CpuLinear : Cpu {
  static at::Tensor linear(const at::Tensor& x, const at::Tensor& w, const at::Tensor& m, const at::Tensor& b, Gate gate) {
    const int64_t out = w.size(0), in = w.size(1), batch = x.size(0);
    at::Tensor y = at::empty({batch, out}, x.options());
    if (y.numel() == 0) return y;
    const Panels panels(out, in * x.element_size());
    at::Tensor scratch = at::empty({panels.threads, panels.rows, in}, x.options());
    const Type param = type_of(w.scalar_type()), type = type_of(x.scalar_type());
    panels.run(out, [&](int64_t thread, int64_t first, int64_t n) {
      const at::Tensor theta = scratch.select(0, thread).narrow(0, 0, n);
      masked_weight_kernels().forward(gate, param, type, at_element(w, first * in), at_element(m, first * in),
                                      theta.mutable_data_ptr(), 0, n * in);
      at::Tensor columns = y.narrow(1, first, n);
      if (b.defined()) at::addmm_out(columns, b.narrow(0, first, n), x, theta.t());
      else at::mm_out(columns, x, theta.t());
    });
    return y;
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(const at::Tensor& dy, const at::Tensor& x,
                                                                        const at::Tensor& w, const at::Tensor& m, Gate gate,
                                                                        std::array<bool, 3> needs) {
    const int64_t out = w.size(0), in = w.size(1), batch = x.size(0);
    const bool needs_gradient = needs[1] || needs[2];
    at::Tensor dw = needs[1] ? at::empty_like(w) : at::Tensor();
    at::Tensor dm = needs[2] ? at::empty_like(w) : at::Tensor();
    const Panels panels(out, (int64_t(needs[0]) + int64_t(needs_gradient)) * in * x.element_size());
    // A sum over panels in 16 bits would round once a panel.
    const at::ScalarType sum_type = x.element_size() == 2 ? at::kFloat : x.scalar_type();
    // Each thread adds to a dx of its own; they are added up in the order of the threads.
    at::Tensor dx = needs[0] ? at::zeros({panels.threads, batch, in}, x.options().dtype(sum_type)) : at::Tensor();
    at::Tensor theta_scratch = needs[0] ? at::empty({panels.threads, panels.rows, in}, x.options()) : at::Tensor();
    at::Tensor g_scratch = needs_gradient ? at::empty({panels.threads, panels.rows, in}, x.options()) : at::Tensor();
    const Type param = type_of(w.scalar_type()), type = type_of(x.scalar_type());
    panels.run(out, [&](int64_t thread, int64_t first, int64_t n) {
      const int64_t start = first * in;
      const at::Tensor dy_panel = dy.narrow(1, first, n);
      const at::Tensor theta = needs[0] ? theta_scratch.select(0, thread).narrow(0, 0, n) : at::Tensor();
      void* theta_data = needs[0] ? theta.mutable_data_ptr() : nullptr;
      if (needs_gradient) {
        at::Tensor g = g_scratch.select(0, thread).narrow(0, 0, n);
        at::mm_out(g, dy_panel.t(), x);
        masked_weight_kernels().backward(gate, param, type, g.const_data_ptr(), at_element(w, start), at_element(m, start),
                                         theta_data, at_element(dw, start), at_element(dm, start), 0, n * in);
      } else {
        masked_weight_kernels().forward(gate, param, type, at_element(w, start), at_element(m, start), theta_data, 0, n * in);
      }
      if (needs[0]) {
        at::Tensor dx_thread = dx.select(0, thread);
        if (sum_type == x.scalar_type()) at::addmm_out(dx_thread, dx_thread, dy_panel, theta);
        else dx_thread.addmm_(dy_panel.to(sum_type), theta.to(sum_type));
      }
    });
    if (needs[0]) dx = (panels.threads == 1 ? dx.select(0, 0) : dx.sum(0)).to(x.scalar_type());
    return {dx, dw, dm};
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(metamask, CPU, library) { MaskedLinear<CpuLinear>::register_in(library); }

}  // namespace metamask::cpu
