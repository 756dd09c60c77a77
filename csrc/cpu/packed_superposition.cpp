// packed_superposition_gradient on the CPU: for each sample and task, the sum of dy x W over the weights whose bit is set.
#include <torch/library.h>

#include <cstring>

#include "../packed_checks.h"
#include "packed_panels.h"
#include "superposition_kernel.h"

namespace metamask::cpu {
namespace {

template <class T>
const SuperpositionKernel<T>& superposition_kernel() {
  const auto of = [](const Superposition& table) -> const SuperpositionKernel<T>& {
    if constexpr (sizeof(T) == 8) return table.float64;
    else return table.float32;
  };
#if defined(METAMASK_X86)
  switch (capability()) {
    case Capability::kAvx512Bf16: return of(kSuperposition_avx512_bf16);
    case Capability::kAvx512: return of(kSuperposition_avx512);
    case Capability::kAvx2: return of(kSuperposition_avx2);
    default: break;
  }
#endif
  return of(kSuperposition_default);
}

// A tile of W: its words of a few hundred tasks, each read for every block of samples, stay in the second-level cache.
constexpr int64_t kTileWeights = 4096, kTileColumns = 1024;

// [samples, rows, columns] as [blocks, rows, columns, lanes]: a block's samples side by side, the last block padded with zeros.
template <class T>
at::Tensor side_by_side(const at::Tensor& from, int64_t samples, int64_t blocks, int64_t rows) {
  const int64_t columns = from.size(-1), padding = blocks * kLanes<T> - samples;
  const at::Tensor padded = at::constant_pad_nd(from.to(kScalar<T>).reshape({samples, rows * columns}), {0, 0, 0, padding});
  return padded.view({blocks, kLanes<T>, rows * columns}).transpose(1, 2).contiguous();
}

// A tile's bits as words, the tasks of a word side by side: each block of samples reads them in order. Row j of a task's bits
// begins at bits[t] + offset + j * bits_row.
void gather(const std::vector<const uint8_t*>& bits, int64_t offset, int64_t bits_row, int64_t outputs, int64_t columns,
            uint64_t* words) {
  const int64_t tasks = int64_t(bits.size());
  for (int64_t j = 0; j < outputs; ++j) {
    for (int64_t k = 0; k < columns; k += kWord) {
      const int64_t at = offset + j * bits_row + k / 8, bytes = packed_bytes(std::min(columns - k, kWord));
      uint64_t* const to = words + (k / kWord * outputs + j) * tasks;
      for (int64_t t = 0; t < tasks; ++t) {
        uint64_t word = 0;
        if (bytes == 8) {
          std::memcpy(&word, bits[t] + at, 8);
        } else {
          for (int64_t i = 0; i < bytes; ++i) word |= uint64_t(bits[t][at + i]) << (8 * i);
        }
        to[t] = word;
      }
    }
  }
}

template <class T>
at::Tensor gradient(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight, const PackedMasks& packed,
                    int64_t groups) {
  const int64_t samples = input.size(0), rows = c10::multiply_integers(input.sizes().slice(1, input.dim() - 2));
  const int64_t tasks = packed.tasks(), bits_row = packed_bytes(weight.size(1)), blocks = (samples + kLanes<T> - 1) / kLanes<T>;
  const GroupedWeight<T> w(weight, groups);
  if (samples * tasks * rows * w.out * w.in == 0) return at::zeros({samples, tasks}, grad.options());
  std::vector<at::Tensor> masks;
  std::vector<const uint8_t*> bits;
  for (int64_t t = 0; t < tasks; ++t) {
    masks.push_back(packed.task(t));
    bits.push_back(masks.back().const_data_ptr<uint8_t>());
  }
  const at::Tensor dy = side_by_side<T>(grad, samples, blocks, rows), x = side_by_side<T>(input, samples, blocks, rows);
  const int64_t dy_row = w.out * kLanes<T>, x_row = groups * w.in * kLanes<T>;
  const Panels panels(w.out, w.in, samples * tasks, sizeof(T), kTileWeights * sizeof(T), kTileColumns * sizeof(T));
  const int64_t tile = panels.rows * round_up(panels.columns, kLanes<T>);
  const Scratch<T> scratch(panels.threads * tile);
  const int64_t tile_words = panels.rows * ((panels.columns + kWord - 1) / kWord) * tasks;
  const Scratch<uint64_t> words(panels.threads * tile_words);
  // Each thread has sums of its own; they are added up in the order of the threads.
  const at::Tensor sums = at::zeros({panels.threads, blocks, tasks, kLanes<T>}, dy.options());
  const T *dy_data = dy.const_data_ptr<T>(), *x_data = x.const_data_ptr<T>();
  T* const sums_data = sums.mutable_data_ptr<T>();
  w.each_tile(panels, scratch.data, tile, [&](const GroupTile<T>& part, T*) {
    uint64_t* const its = words.data + part.thread * tile_words;
    gather(bits, part.first * bits_row + part.column / 8, bits_row, part.rows, part.columns, its);
    for (int64_t block = 0; block < blocks; ++block) {
      superposition_kernel<T>().add(dy_data + block * rows * dy_row + part.first * kLanes<T>, dy_row,
                                    x_data + block * rows * x_row + (part.group * w.in + part.column) * kLanes<T>, x_row, part.w,
                                    part.w_row, its, sums_data + (part.thread * blocks + block) * tasks * kLanes<T>, rows, tasks,
                                    part.rows, part.columns);
    }
  });
  const at::Tensor total = sums.sum(0).transpose(1, 2).reshape({blocks * kLanes<T>, tasks});
  return total.narrow(0, 0, samples).to(grad.scalar_type()).contiguous();
}

at::Tensor packed_superposition_gradient(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
                                         at::TensorList packed_list, int64_t groups) {
  check_packed_weight(weight, groups);
  check_packed_input(input, weight, groups);
  const PackedMasks packed = packed_weight_masks(packed_list, weight);
  check_packed_grad(grad, input, weight);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return weight.scalar_type() == at::kDouble ? gradient<double>(grad, input, weight, packed, groups)
                                             : gradient<float>(grad, input, weight, packed, groups);
}

}  // namespace

TORCH_LIBRARY_IMPL(metamask, CPU, library) { library.impl("packed_superposition_gradient", &packed_superposition_gradient); }

}  // namespace metamask::cpu
