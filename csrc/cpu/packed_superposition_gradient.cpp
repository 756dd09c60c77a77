// packed_superposition_gradient on the CPU: for each sample and task, the sum of dy x W over the weights whose bit is set. The
// products are formed a tile at a time, and each is used for all tasks.
#include <torch/library.h>

#include "cpu/kernels/superposition.h"
#include "cpu/packed_panels.h"
#include "ops/packed.h"

namespace metamask::cpu {
namespace {

template <class T>
const SuperpositionKernel<T>& superposition_kernel() {
  const Superposition& table = METAMASK_CHOSEN_TABLE(kSuperposition);
  if constexpr (sizeof(T) == 8) return table.float64;
  else return table.float32;
}

// Rows of W and samples whose products are in the second-level cache together.
constexpr int64_t kTileRows = 4, kTileSamples = 64;

template <class T>
at::Tensor gradient(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight, const PackedMasks& packed,
                    int64_t groups) {
  const int64_t samples = input.size(0), rows = rows_per_sample(input);
  const int64_t tasks = packed.tasks(), bits_row = packed_bytes(weight.size(1));
  at::Tensor result = at::empty({samples, tasks}, grad.options().dtype(kScalar<T>));
  std::vector<at::Tensor> copies;
  std::vector<const uint8_t*> bits;
  for (int64_t t = 0; t < tasks; ++t) bits.push_back(packed.bits(t, copies));
  const GroupedWeight<T> w(weight, groups);
  const PackedRows<T> dy(grad, {}, rows, 1, w.out, 1), x(input, {}, rows, groups, w.in);
  constexpr int64_t kRow = kSuperposedColumns;
  const Panels panels(w.out, w.in, samples * tasks, sizeof(T), kTileRows * kRow * sizeof(T), kRow * sizeof(T));
  const int64_t a_sample = panels.rows * kRow, some = std::min(samples, kTileSamples);
  const int64_t each = some * a_sample + panels.rows * round_up(panels.columns, kRowBytes / int64_t(sizeof(T)));
  // Each thread has sums of its own; they are added up in the order of the threads.
  const int64_t sums_row = round_up(tasks, kTaskPad);
  const Scratch<T> sums(panels.threads * samples * sums_row);
  std::fill_n(sums.data, panels.threads * samples * sums_row, T(0));
  w.each_tile(panels, each, [&](const GroupTile<T>& part, T* a) {
    const int64_t wide = round_up(part.columns, kRowBytes / int64_t(sizeof(T)));
    for (int64_t first = 0; first < samples; first += some) {
      const int64_t count = std::min(some, samples - first);
      for (int64_t b = 0; b < count; ++b) {
        gemm_kernels<T>().gemm_nn(dy.at((first + b) * rows, 0) + part.first, 1, dy.row,
                                  x.at((first + b) * rows, part.group) + part.column, x.row, a + b * a_sample, kRow, part.rows,
                                  rows, wide, false);
      }
      T* const to = sums.data + (part.thread * samples + first) * sums_row;
      for (int64_t i = 0; i < part.rows; ++i) {
        const int64_t offset = (part.first + i) * bits_row + part.column / 8;
        for (int64_t t = 0; t < tasks; t += kSuperposedTasks) {
          superposition_kernel<T>().add(a + i * kRow, a_sample, part.w + i * part.w_row, bits.data() + t, offset, to + t, sums_row,
                                        count, std::min(kSuperposedTasks, tasks - t), part.columns);
        }
      }
    }
  });
  T* const out = mutable_data<T>("result", result);
  add_threads(sums.data, panels.threads, samples, sums_row, tasks, [&](int64_t b, const T* sum) {  //
    std::copy_n(sum, tasks, out + b * tasks);
  });
  return result.to(grad.scalar_type());
}

at::Tensor packed_superposition_gradient(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
                                         at::TensorList packed_list, int64_t groups) {
  check_packed_weight(weight, groups);
  check_batch_input(input, weight, groups);
  const PackedMasks packed = packed_weight_masks(packed_list, weight);
  check_superposition(grad, input, weight, packed);
  const NoAutocast no_autocast;
  if (weight.numel() == 0) return at::zeros({input.size(0), packed.tasks()}, grad.options());
  return weight.scalar_type() == at::kDouble ? gradient<double>(grad, input, weight, packed, groups)
                                             : gradient<float>(grad, input, weight, packed, groups);
}

}  // namespace

TORCH_LIBRARY_IMPL(metamask, CPU, library) { library.impl("packed_superposition_gradient", &packed_superposition_gradient); }

}  // namespace metamask::cpu
