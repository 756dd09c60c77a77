// Parts of the ops on packed masks: the rows of a batch as the kernels take them, and the tiles of a weight that may be grouped.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "cpu/kernels/packed.h"
#include "cpu/panels.h"

namespace metamask::cpu {

template <class T>
const PackedKernels<T>& packed_kernels() {
  const Packed& table = METAMASK_CHOSEN_TABLE(kPacked);
  if constexpr (sizeof(T) == 8) return table.float64;
  else return table.float32;
}

// The rows [samples, rows, groups * columns] of a tensor as T: the samples in `order` (empty: unchanged), each group's columns
// padded with zeros to `pad`. Uses the tensor's own memory if it is all that already.
template <class T>
class PackedRows {
 public:
  PackedRows(const at::Tensor& from, const std::vector<int64_t>& order, int64_t rows_each, int64_t groups, int64_t columns,
             int64_t pad = kRowBytes / int64_t(sizeof(T)))
      : source_(from.to(kScalar<T>).contiguous()),
        rows(from.size(0) * rows_each),
        group(round_up(columns, pad)),
        row(groups * group),
        copied_(!order.empty() || group != columns),
        copy_(copied_ ? rows * row : 0) {
    data_ = data<T>("rows", source_);
    if (!copied_ || row == 0) return;
    at::parallel_for(0, rows, std::max<int64_t>(kGrain / std::max<int64_t>(row, 1), 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t source = order.empty() ? i : order[i / rows_each] * rows_each + i % rows_each;
        for (int64_t g = 0; g < groups; ++g) {
          T* to = copy_.data + i * row + g * group;
          std::copy_n(data_ + (source * groups + g) * columns, columns, to);
          std::fill(to + columns, to + group, T(0));
        }
      }
    });
    data_ = copy_.data;
  }

  bool finite() const {
    int not_finite = 0;  // without a branch, so that it is vectorised
    for (int64_t i = 0; i < rows * row; ++i) not_finite |= !(std::abs(data_[i]) <= std::numeric_limits<T>::max());
    return not_finite == 0;
  }

  const T* at(int64_t i, int64_t of_group) const { return data_ + i * row + of_group * group; }

 private:
  at::Tensor source_;

 public:
  const int64_t rows, group, row;

 private:
  const bool copied_;
  Scratch<T> copy_;
  const T* data_;
};

// A tile of W as T: rows of one group, and a piece of their columns. `next` is the tile of the rows after it, if W is read in place
// and that tile has the same size and group; else null.
template <class T>
struct GroupTile {
  int64_t thread, group, first, rows, column, columns;
  const T* w;
  int64_t w_row;
  const T* next = nullptr;
};

// W, [groups * out_per_group, in].
template <class T>
struct GroupedWeight {
  const at::Tensor tensor;
  const int64_t groups, out, in;
  const Type type;

  GroupedWeight(const at::Tensor& weight, int64_t groups)
      : tensor(weight.contiguous()), groups(groups), out(weight.size(0)), in(weight.size(1)), type(type_of(weight.scalar_type())) {}

  // Calls work(tile, free scratch) for every tile of the panels. Each thread has `each` elements of scratch; a W that is stored in
  // 16 bits is widened into the last part of it, of a tile's size.
  template <class Work>
  void each_tile(const Panels& panels, int64_t each, const Work& work) const {
    const int64_t tile_row = round_up(panels.columns, kRowBytes / int64_t(sizeof(T))), bytes = tensor.element_size();
    const bool same = bytes == sizeof(T);
    const void* const memory = data("weight", tensor);
    panels.run([&](int64_t thread, int64_t first, int64_t rows) {
      T* const free = thread_tiles<T>(each);
      T* const widened = free + each - panels.rows * tile_row;
      for (int64_t end = first + rows, next; first < end; first = next) {
        const int64_t group = first / (out / groups);
        next = std::min(end, (group + 1) * (out / groups));
        for (int64_t column = 0; column < in; column += panels.columns) {
          const int64_t columns = std::min(panels.columns, in - column);
          GroupTile<T> tile{thread, group, first, next - first, column, columns, widened, tile_row};
          if (same) {
            tile.w = static_cast<const T*>(memory) + first * in + column;
            tile.w_row = in;
            if (first + 2 * tile.rows <= (group + 1) * (out / groups) && columns == in) tile.next = tile.w + tile.rows * in;
          } else {
            for (int64_t i = 0; i < tile.rows; ++i) {
              const void* from = at_element(memory, (first + i) * in + column, bytes);
              packed_kernels<T>().widen(type, from, widened + i * tile_row, columns);
            }
          }
          work(tile, free);
        }
      }
    });
  }

  // Writes a tile of W's gradient to `gradient`, which has W's type and is contiguous.
  void write(const GroupTile<T>& tile, const T* from, int64_t from_row, void* gradient) const {
    for (int64_t i = 0; i < tile.rows; ++i) {
      void* to = at_element(gradient, (tile.first + i) * in + tile.column, tensor.element_size());
      packed_kernels<T>().narrow(from + i * from_row, type, to, tile.columns);
    }
  }
};

}  // namespace metamask::cpu
