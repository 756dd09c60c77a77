// packed_masked_linear and its gradients on the CPU. A panel of W is read once for all samples. Samples whose task has many rows in
// the batch are grouped: the task's theta is expanded, a tile at a time, and multiplied as a dense one. The others read W through
// their bits. Where the first have so many rows that a panel's passes over them cost more than their products, they go through BLAS
// (cpu/products.h). docs/internals/performance.md has the measurements.
#include <torch/library.h>

#include <array>
#include <numeric>
#include <tuple>

#include "cpu/packed_panels.h"
#include "cpu/products.h"
#include "ops/packed.h"

namespace metamask::cpu {
namespace {

// From this many rows of a task on, expanding its theta costs less than testing its bits for each of them.
constexpr int64_t kExpandRows = 6;
// A tile of W leaves room in the second-level cache for the next one, which is prefetched meanwhile, and for the bits and rows of x
// that it meets. When a task's theta is expanded there is no prefetch; backward has three tiles more.
int64_t streamed_tile() { return second_level_cache() / 16; }
int64_t expanded_tile() { return second_level_cache() / 8; }
int64_t backward_tile() { return second_level_cache() / 16; }
// Forward, a row's piece with those of four samples stays in the first-level cache. Backward, each panel passes once over dx, and a
// tile needs many rows.
constexpr int64_t kForwardRow = 8 * 1024, kBackwardRow = 4 * 1024;

// The samples of a mixed-task batch in the order of the work: first those whose task has few rows, then each other task's together.
struct Batch {
  struct Run {
    int64_t first, rows;  // of rows in the order of the groups
    const uint8_t* bits;
  };

  int64_t samples, rows;             // rows of each sample
  std::vector<int64_t> order;        // the batch's sample at each place; empty: as they came
  std::vector<const uint8_t*> bits;  // of each row
  std::vector<Run> runs;             // of the tasks to expand; the rows before the first are the others
  int64_t few = 0;                   // the number of those rows
  std::vector<at::Tensor> copies;    // of masks that are not contiguous

  Batch(const at::Tensor& slots, const PackedMasks& packed, int64_t rows_each) : samples(slots.numel()), rows(rows_each) {
    const at::Tensor contiguous = slots.contiguous();
    const int64_t* slot = data<int64_t>("slots", contiguous);
    std::vector<int64_t> sorted(samples);
    std::iota(sorted.begin(), sorted.end(), 0);
    std::stable_sort(sorted.begin(), sorted.end(), [&](int64_t a, int64_t b) { return slot[a] < slot[b]; });
    std::vector<const uint8_t*> of_sample(samples);
    std::vector<std::pair<int64_t, int64_t>> many;
    for (int64_t begin = 0, end; begin < samples; begin = end) {
      for (end = begin; end < samples && slot[sorted[end]] == slot[sorted[begin]];) ++end;
      const uint8_t* const its = packed.bits(slot[sorted[begin]], copies);
      for (int64_t i = begin; i < end; ++i) of_sample[sorted[i]] = its;
      if ((end - begin) * rows >= kExpandRows) many.emplace_back(begin, end);
    }
    few = samples * rows;
    if (!many.empty()) arrange(sorted, many, of_sample);
    bits.reserve(few);
    for (int64_t place = 0; place * rows < few; ++place) bits.insert(bits.end(), rows, of_sample[sample(place)]);
  }

  int64_t sample(int64_t place) const { return order.empty() ? place : order[place]; }
  int64_t row_of(int64_t place) const { return sample(place / rows) * rows + place % rows; }

 private:
  void arrange(const std::vector<int64_t>& sorted, const std::vector<std::pair<int64_t, int64_t>>& many,
               const std::vector<const uint8_t*>& of_sample) {
    int64_t done = 0;
    for (const auto& [begin, end] : many) {
      order.insert(order.end(), sorted.begin() + done, sorted.begin() + begin);
      done = end;
    }
    order.insert(order.end(), sorted.begin() + done, sorted.end());
    few = int64_t(order.size()) * rows;
    for (const auto& [begin, end] : many) {
      runs.push_back({int64_t(order.size()) * rows, (end - begin) * rows, of_sample[sorted[begin]]});
      order.insert(order.end(), sorted.begin() + begin, sorted.begin() + end);
    }
    if (std::is_sorted(order.begin(), order.end())) order.clear();
  }
};

template <class T>
class PackedLinear {
 public:
  PackedLinear(const at::Tensor& weight, int64_t groups, const Batch& batch)
      : w_(weight, groups), batch_(batch), bits_row_(packed_bytes(w_.in)) {}

  // Adds y without the bias to `y`, in the order of the groups.
  void forward(const PackedRows<T>& x, T* y) const {
    const bool blas = this->blas(Pass::kForward);
    if (blas) {
      each_theta([&](const Batch::Run& run, const at::Tensor& theta) {
        matrix(y + run.first * w_.out, run.rows, w_.out, w_.out).addmm_(rows_of(run, x, w_.in), theta.t());
      });
      if (batch_.few == 0) return;
    }
    const int64_t bytes = batch_.runs.empty() ? streamed_tile() : expanded_tile();
    const Panels panels(w_.out, w_.in, blas ? batch_.few : x.rows, sizeof(T), bytes, kForwardRow);
    const int64_t tile_row = round_up(panels.columns, kPad), tile = panels.rows * tile_row;
    const bool finite = x.finite();
    w_.each_tile(panels, 2 * tile, [&](const GroupTile<T>& part, T* free) {
      T* const to = y + part.first;
      const T* const from = x.at(0, part.group) + part.column;
      const int64_t offset = part.first * bits_row_ + part.column / 8;
      kernels().forward(from, x.row, finite, {batch_.bits.data(), offset, bits_row_}, part.w, part.w_row, part.next, to, w_.out,
                        batch_.few, part.rows, part.columns);
      if (blas) return;
      for (const Batch::Run& run : batch_.runs) {
        kernels().expand(run.bits + offset, bits_row_, part.w, part.w_row, free, tile_row, part.rows, part.columns);
        gemm_kernels<T>().gemm_nt(from + run.first * x.row, x.row, free, tile_row, to + run.first * w_.out, w_.out, run.rows,
                                  part.rows, round_up(part.columns, kPad));
      }
    });
  }

  // Makes dx, [samples, rows, groups * in] in the batch's own order, and dW, each if it is wanted.
  void backward(const PackedRows<T>& dy, const PackedRows<T>& x, T* dx_result, void* dw) const {
    const bool blas = this->blas(Pass::kBackward);
    const int64_t panel_rows = blas ? batch_.few : x.rows;
    // Of the rows that go through BLAS: dx, and the sum of dW.
    const at::Tensor dx_blas = blas && dx_result != nullptr ? empty(x.rows - batch_.few, w_.in) : at::Tensor();
    const at::Tensor dw_blas = blas && dw != nullptr ? empty(w_.out, row_).zero_() : at::Tensor();
    if (blas) backward_blas(dy, x, dx_blas, dw_blas);
    const T* const begun = data<T>("gradient of weight", dw_blas);

    const Panels panels(w_.out, w_.in, panel_rows, sizeof(T), backward_tile(), kBackwardRow);
    const int64_t tile_row = round_up(panels.columns, kPad), tile = panels.rows * tile_row;
    // Each thread adds to a dx of its own; they are added up in the order of the threads.
    const int64_t dx_size = dx_result != nullptr ? panel_rows * x.row : 0;
    const Scratch<T> dx(panels.threads * dx_size);
    at::parallel_for(0, panels.threads * dx_size, kGrain, [&](int64_t begin, int64_t end) {  //
      std::fill(dx.data + begin, dx.data + end, T(0));
    });
    w_.each_tile(panels, 3 * tile, [&](const GroupTile<T>& part, T* free) {
      T *total = free, *g = free + tile;
      const int64_t wide = round_up(part.columns, kPad), offset = part.first * bits_row_ + part.column / 8;
      const BitRows bits{batch_.bits.data(), offset, bits_row_};
      const T *from = x.at(0, part.group) + part.column, *grad = dy.at(0, 0) + part.first;
      if (dx_result != nullptr) {
        T* to = dx.data + part.thread * dx_size + (from - x.at(0, 0));
        kernels().input_gradient(grad, dy.row, bits, part.w, part.w_row, to, x.row, batch_.few, part.rows, part.columns);
        for (const Batch::Run& run : batch_.runs) {
          if (blas) break;
          kernels().expand(run.bits + offset, bits_row_, part.w, part.w_row, g, tile_row, part.rows, part.columns);
          gemm_kernels<T>().gemm_nn(grad + run.first * dy.row, dy.row, 1, g, tile_row, to + run.first * x.row, x.row, run.rows,
                                    part.rows, wide, true);
        }
      }
      if (dw != nullptr) {
        std::fill_n(total, part.rows * tile_row, T(0));
        for (int64_t i = 0; begun != nullptr && i < part.rows; ++i) {
          std::copy_n(begun + (part.first + i) * row_ + part.column, part.columns, total + i * tile_row);
        }
        kernels().weight_gradient(grad, dy.row, bits, from, x.row, total, tile_row, batch_.few, part.rows, part.columns);
        for (const Batch::Run& run : batch_.runs) {
          if (blas) break;
          gemm_kernels<T>().gemm_nn(grad + run.first * dy.row, 1, dy.row, from + run.first * x.row, x.row, g, tile_row, part.rows,
                                    run.rows, wide, false);
          kernels().add_masked(run.bits + offset, bits_row_, g, tile_row, total, tile_row, part.rows, part.columns);
        }
        w_.write(part, total, tile_row, dw);
      }
    });
    if (dx_result == nullptr) return;
    const int64_t columns = w_.groups * w_.in;
    add_threads(dx.data, panels.threads, panel_rows, x.row, x.row, [&](int64_t i, const T* sum) {
      T* to = dx_result + batch_.row_of(i) * columns;
      for (int64_t g = 0; g < w_.groups; ++g) std::copy_n(sum + g * x.group, w_.in, to + g * w_.in);
    });
    if (!blas) return;
    const T* const rows = data<T>("gradient of input", dx_blas);
    at::parallel_for(0, x.rows - panel_rows, std::max<int64_t>(kGrain / columns, 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::copy_n(rows + i * columns, columns, dx_result + batch_.row_of(panel_rows + i) * columns);
      }
    });
  }

 private:
  static constexpr int64_t kPad = kRowBytes / int64_t(sizeof(T));
  static const PackedKernels<T>& kernels() { return packed_kernels<T>(); }

  // Whether the tasks with many rows go through BLAS.
  bool blas(Pass pass) const {
    return w_.groups == 1 && tasks_through_blas(pass, kScalar<T>, batch_.samples * batch_.rows - batch_.few,
                                                int64_t(batch_.runs.size()), w_.in, w_.out);
  }

  at::Tensor empty(int64_t rows, int64_t columns) const {
    return at::empty({rows, columns}, w_.tensor.options().dtype(kScalar<T>));
  }

  at::Tensor matrix(const T* from, int64_t rows, int64_t columns, int64_t row) const {
    return at::from_blob(const_cast<T*>(from), {rows, columns}, {row, 1}, w_.tensor.options().dtype(kScalar<T>));
  }

  at::Tensor rows_of(const Batch::Run& run, const PackedRows<T>& from, int64_t columns) const {
    return matrix(from.at(run.first, 0), run.rows, columns, from.row);
  }

  // Calls work(run, its theta) for every task with many rows.
  template <class Work>
  void each_theta(const Work& work) const {
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor w = w_.tensor.to(kScalar<T>), wide = empty(w_.out, row_), theta = wide.narrow(1, 0, w_.in);
    const T* const w_data = data<T>("weight", w);
    T* const theta_data = mutable_data<T>("theta", wide);
    for (const Batch::Run& run : batch_.runs) {
      at::parallel_for(0, w_.out, std::max<int64_t>(kGrain / w_.in, 1), [&](int64_t begin, int64_t end) {
        kernels().expand(run.bits + begin * bits_row_, bits_row_, w_data + begin * w_.in, w_.in, theta_data + begin * row_, row_,
                         end - begin, w_.in);
      });
      work(run, theta);
    }
  }

  // Makes dx of the rows that go through BLAS, and adds to dW, [out, row_], each if it is defined.
  void backward_blas(const PackedRows<T>& dy, const PackedRows<T>& x, const at::Tensor& dx, const at::Tensor& dw) const {
    const auto add_to_weight = [&](const Batch::Run& run) {
      const at::Tensor g = at::mm(rows_of(run, dy, w_.out).t(), rows_of(run, x, row_));
      const T* const g_data = data<T>("gradient of theta", g);
      T* const dw_data = mutable_data<T>("gradient of weight", dw);
      at::parallel_for(0, w_.out, std::max<int64_t>(kGrain / w_.in, 1), [&](int64_t begin, int64_t end) {
        kernels().add_masked(run.bits + begin * bits_row_, bits_row_, g_data + begin * row_, row_, dw_data + begin * row_, row_,
                             end - begin, w_.in);
      });
    };
    if (!dx.defined()) {
      const at::AutoDispatchBelowADInplaceOrView below;
      for (const Batch::Run& run : batch_.runs) add_to_weight(run);
      return;
    }
    each_theta([&](const Batch::Run& run, const at::Tensor& theta) {
      at::Tensor part = dx.narrow(0, run.first - batch_.few, run.rows);
      at::mm_out(part, rows_of(run, dy, w_.out), theta);
      if (dw.defined()) add_to_weight(run);
    });
  }

  const GroupedWeight<T> w_;
  const Batch& batch_;
  const int64_t bits_row_;
  const int64_t row_ = round_up(w_.in, kPad);  // of a whole theta, padded with zeros
};

using OptionalTensor = std::optional<at::Tensor>;
using OptionalList = std::optional<std::vector<at::Tensor>>;

// Checks the values of slots too.
struct Arguments : PackedArguments {
  Arguments(const at::Tensor& input, const at::Tensor& slots, const at::Tensor& weight, at::TensorList packed_list,
            const OptionalTensor& bias, const OptionalList& packed_bias_list, int64_t groups)
      : PackedArguments(input, slots, weight, packed_list, bias, packed_bias_list, groups) {
    const auto values = slots.accessor<int64_t, 1>();
    const int64_t count = values.stride(0) == 0 ? std::min<int64_t>(values.size(0), 1) : values.size(0);
    for (int64_t i = 0; i < count; ++i) check_slot(values[i], packed.tasks(), i);
  }
};

at::Tensor zeros_or_bias(const Batch& batch, const Arguments& arguments, const at::Tensor& slots, const OptionalTensor& bias,
                         at::IntArrayRef sizes, at::ScalarType type) {
  const int64_t out = sizes.back();
  at::Tensor y = at::empty(sizes, slots.options().dtype(type));
  if (!is_given(bias)) return y.zero_();
  const at::Tensor b = bias->to(type);
  if (!arguments.packed_bias.has_value()) return y.copy_(b.expand_as(y));
  const at::Tensor contiguous = slots.contiguous(), b_row = b.contiguous();
  const int64_t* slot = data<int64_t>("slots", contiguous);
  std::vector<at::Tensor> copies;
  AT_DISPATCH_FLOATING_TYPES(type, "packed_masked_linear", [&] {
    const Scratch<scalar_t> row(round_up(out, kRowBytes / int64_t(sizeof(scalar_t))));
    scalar_t* y_data = mutable_data<scalar_t>("y", y);
    const scalar_t* b_data = data<scalar_t>("bias", b_row);
    for (int64_t place = 0; place < batch.samples; ++place) {
      const uint8_t* const bits = arguments.packed_bias->bits(slot[batch.sample(place)], copies);
      packed_kernels<scalar_t>().expand(bits, 0, b_data, 0, row.data, 0, 1, out);
      for (int64_t r = 0; r < batch.rows; ++r) std::copy_n(row.data, out, y_data + (place * batch.rows + r) * out);
    }
  });
  return y;
}

at::Tensor packed_masked_linear(const at::Tensor& input, const at::Tensor& slots, const at::Tensor& weight,
                                at::TensorList packed_list, const OptionalTensor& bias, const OptionalList& packed_bias_list,
                                int64_t groups, std::optional<at::ScalarType> dtype) {
  const Arguments arguments(input, slots, weight, packed_list, bias, packed_bias_list, groups);
  const at::ScalarType out_type = dtype.value_or(weight.scalar_type());
  check_storage("dtype", out_type, weight);
  const NoAutocast no_autocast;
  const at::ScalarType type = compute_type(weight);
  const std::vector<int64_t> sizes = with_last(input, weight.size(0));
  // Rows without columns take no memory, and there may be any number of them.
  if (c10::multiply_integers(sizes) == 0) return at::empty(sizes, input.options().dtype(out_type));
  const Batch batch(slots, arguments.packed, rows_per_sample(input));
  at::Tensor y = zeros_or_bias(batch, arguments, slots, bias, sizes, type);
  AT_DISPATCH_FLOATING_TYPES(type, "packed_masked_linear", [&] {
    const PackedRows<scalar_t> x(input.to(out_type), batch.order, batch.rows, groups, weight.size(1));
    PackedLinear<scalar_t>(weight, groups, batch).forward(x, mutable_data<scalar_t>("y", y));
  });
  if (!batch.order.empty()) {
    const at::Tensor order = at::tensor(batch.order, slots.options());
    y = at::empty_like(y).index_copy_(0, order, y);
  }
  return y.to(out_type);
}

// Sums over each sample's rows, then over the samples whose bit is set.
at::Tensor bias_gradient(const at::Tensor& grad, const at::Tensor& slots, const Arguments& arguments, int64_t rows,
                         const at::Tensor& bias) {
  const int64_t samples = slots.numel(), out = bias.numel();
  const at::ScalarType type = compute_type(bias);
  const at::Tensor sums = grad.reshape({samples, rows, out}).sum(1, false, type);
  if (!arguments.packed_bias.has_value()) return sums.sum(0).to(bias.scalar_type());
  at::Tensor db = at::zeros({out}, sums.options());
  const at::Tensor contiguous = slots.contiguous();
  const int64_t* slot = data<int64_t>("slots", contiguous);
  std::vector<at::Tensor> copies;
  AT_DISPATCH_FLOATING_TYPES(type, "packed_masked_linear_backward", [&] {
    const scalar_t* sum = data<scalar_t>("sums of grad", sums);
    scalar_t* total = mutable_data<scalar_t>("gradient of bias", db);
    for (int64_t i = 0; i < samples; ++i, sum += out) {
      const uint8_t* const byte = arguments.packed_bias->bits(slot[i], copies);
      for (int64_t o = 0; o < out; ++o) total[o] += byte[o / 8] >> (o % 8) & 1 ? sum[o] : scalar_t(0);
    }
  });
  return db.to(bias.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> packed_masked_linear_backward(const at::Tensor& grad, const at::Tensor& input,
                                                                             const at::Tensor& slots, const at::Tensor& weight,
                                                                             at::TensorList packed_list, const OptionalTensor& bias,
                                                                             const OptionalList& packed_bias_list, int64_t groups,
                                                                             std::array<bool, 3> output_mask) {
  const Arguments arguments(input, slots, weight, packed_list, bias, packed_bias_list, groups);
  check_batch_grad(grad, input, weight);
  const NoAutocast no_autocast;
  const at::ScalarType product = grad.scalar_type(), type = compute_type(grad);
  const int64_t rows = rows_per_sample(input), in = weight.size(1);
  at::Tensor dx, dw, db;
  if (output_mask[0]) dx = at::empty(input.sizes(), input.options().dtype(type));
  if (output_mask[1]) dw = Cpu::gradient_like(weight.contiguous());
  if (weight.numel() == 0 && output_mask[0]) dx.zero_();
  if (weight.numel() > 0 && (output_mask[0] || output_mask[1])) {
    const Batch batch(slots, arguments.packed, rows);
    AT_DISPATCH_FLOATING_TYPES(type, "packed_masked_linear_backward", [&] {
      const PackedRows<scalar_t> dy(grad, batch.order, rows, 1, weight.size(0), 1);
      const PackedRows<scalar_t> x(input.to(product), batch.order, rows, groups, in);
      PackedLinear<scalar_t>(weight, groups, batch)
          .backward(dy, x, mutable_data<scalar_t>("gradient of input", dx), mutable_data("gradient of weight", dw));
    });
  }
  if (output_mask[0]) dx = dx.to(input.scalar_type());
  if (output_mask[2] && is_given(bias)) db = bias_gradient(grad, slots, arguments, rows, *bias);
  return {dx, dw, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(metamask, CPU, library) {
  library.impl("packed_masked_linear", &packed_masked_linear);
  library.impl("packed_masked_linear_backward", &packed_masked_linear_backward);
}

}  // namespace metamask::cpu
