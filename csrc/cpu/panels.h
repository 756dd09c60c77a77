// Panels of theta for the linear ops on the CPU: how the weight is cut, and the memory of the tiles.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>

#include "cpu/kernels/gemm.h"
#include "cpu/masked_weight.h"

namespace metamask::cpu {

inline const Gemm& gemm_table() { return METAMASK_CHOSEN_TABLE(kGemm); }

template <class T>
const GemmKernels<T>& gemm_kernels() {
  if constexpr (sizeof(T) == 8) return gemm_table().float64;
  else return gemm_table().float32;
}

template <class T>
constexpr Type kType = sizeof(T) == 8 ? Type::kFloat64 : Type::kFloat32;

inline int64_t second_level_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 0);
  if (bytes > 0) return bytes;
#endif
  return int64_t(1) << 20;
}

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// The cut of theta, [out, in]: a panel has `rows` rows, and its columns are worked on `columns` at a time, so that a tile of rows x
// columns stays in cache. One scratch a thread.
struct Panels {
  int64_t out, rows, columns, count, threads;

  // tile_bytes: the most that a tile may take; row_bytes: the most that one of its rows may take; masks: the number of masks
  // applied to the weight.
  Panels(int64_t out, int64_t in, int64_t batch, int64_t element, int64_t tile_bytes, int64_t row_bytes, int64_t masks = 1)
      : out(out) {
    columns = std::clamp<int64_t>(row_bytes / element, 1, std::max<int64_t>(in, 1));
    const int64_t fits = std::max<int64_t>(tile_bytes / (columns * element), 1);
    // Below about 10 microseconds of work, waking another thread costs more than it does.
    const double nanoseconds = std::min(double(out) * double(in) * (0.25 * double(masks) + 0.01 * double(batch)), 1e18);
    const int64_t pool = at::in_parallel_region() || nanoseconds < 10000 ? 1 : at::get_num_threads();
    // Several panels for each thread, so that a late one costs little. A small layer has one, which needs the fewest calls.
    const int64_t pieces = pool > 1 ? std::clamp<int64_t>(int64_t(nanoseconds / 5000), pool, 4 * pool) : 1;
    const int64_t share = (out + pieces - 1) / pieces;
    rows = std::clamp<int64_t>(round_up(std::min(fits, share), 4), 4, std::max<int64_t>(out, 4));
    count = (out + rows - 1) / rows;
    threads = std::min(pool, std::max<int64_t>(count, 1));
  }

  // Calls work(thread, first row, number of rows) for every panel. The division among threads depends on their number only.
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
constexpr at::ScalarType kScalar = c10::CppTypeToScalarType<T>::value;

// Returns a thread's own memory for tiles, uninitialised and kept from call to call: the caches bound its size. If it were freed
// after each call, malloc could give memory that others have freed back to the system in the middle of a small layer's forward:
// measured, up to four times the forward's own time.
template <class T>
T* thread_tiles(int64_t n) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local int64_t size = 0;
  const int64_t wanted = round_up(n * int64_t(sizeof(T)), 64);
  if (wanted > size) {
    size = 0;
    memory.reset(std::aligned_alloc(64, wanted));
    TORCH_CHECK(memory != nullptr, "cannot allocate ", wanted, " bytes for a tile of the weight");
    size = wanted;
  }
  return static_cast<T*>(memory.get());
}

// Uninitialised memory. A small layer's is on the stack, because torch's allocator takes as long as its arithmetic.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) {
    if (n <= kSmall) return;
    large_ = at::empty({n * int64_t(sizeof(T))}, at::TensorOptions().dtype(at::kByte));
    data = static_cast<T*>(mutable_data("scratch", large_));
  }
  Scratch(const Scratch&) = delete;

 private:
  static constexpr int64_t kSmall = 16 * 1024 / int64_t(sizeof(T));
  at::Tensor large_;
  alignas(64) T small_[kSmall];

 public:
  T* data = small_;
};

// A contiguous matrix as T, its rows padded with zeros to whole vectors. Uses the matrix itself if it is that already.
template <class T>
class Rows {
 public:
  explicit Rows(const at::Tensor& from)
      : source_(from.scalar_type() == kScalar<T> ? from : from.to(kScalar<T>)),
        row(round_up(from.size(1), kRowBytes / int64_t(sizeof(T)))),
        copy_(row == from.size(1) ? 0 : from.size(0) * row) {
    const int64_t rows = from.size(0), columns = from.size(1);
    data = metamask::data<T>("rows", source_);
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

// Returns the address of one element of a parameter of 2, 4 or 8 bytes an element.
template <class Pointer>
Pointer at_element(Pointer base, int64_t element, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return base == nullptr ? nullptr : static_cast<Byte*>(base) + element * bytes;
}

inline Sink at_element(const Sink& sink, int64_t element, int64_t bytes) {
  Sink moved = sink;
  moved.gradient = at_element(sink.gradient, element, bytes);
  moved.parameter = at_element(sink.parameter, element, bytes);
  moved.momentum_buffer = at_element(sink.momentum_buffer, element, bytes);
  moved.exp_avg = at_element(sink.exp_avg, element, bytes);
  moved.exp_avg_sq = at_element(sink.exp_avg_sq, element, bytes);
  return moved;
}

// A tile of theta or of its gradient: `rows` x `columns` of the parameters from (first, column) on, in scratch rows of `tile_row`.
struct Tile {
  int64_t first, rows, column, columns, in, tile_row;

  // Calls work(element of the parameters, element of the tile, number) for each contiguous piece: one for a tile of whole rows
  // without padding, else one a row.
  template <class Work>
  void each_piece(const Work& work) const {
    if (columns == in && tile_row == in) return work(first * in, 0, rows * in);
    for (int64_t i = 0; i < rows; ++i) work((first + i) * in + column, i * tile_row, columns);
  }
};

// Adds up the threads' dx, [batch] rows of `row` each, in the order of the threads: into the first one's, row by row. Then calls
// finish(row number, sums) for each row.
template <class T, class Finish>
void add_threads(T* dx, int64_t threads, int64_t batch, int64_t row, int64_t in, const Finish& finish) {
  if (in == 0) return;
  const auto add_up = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* sum = dx + i * row;
      for (int64_t thread = 1; thread < threads; ++thread) {
        const T* more = sum + thread * batch * row;
        for (int64_t k = 0; k < in; ++k) sum[k] += more[k];
      }
      finish(i, sum);
    }
  };
  if (threads == 1) return add_up(0, batch);
  at::parallel_for(0, batch, std::max<int64_t>(kGrain / std::max<int64_t>(in, 1), 1), add_up);
}

// masked_linear on processors that multiply bfloat16 (masked_linear_bfloat16.cpp).
bool multiplies_bfloat16();
at::Tensor linear_bfloat16(const at::Tensor& x, const at::Tensor& w, const at::Tensor& m, const at::Tensor& b, Gate gate);
at::Tensor linear_backward_bfloat16(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& w, const at::Tensor& m, Gate gate,
                                    bool needs_dx, const Sink& dw, const Sink& dm, bool blas);

// masked_linear through torch's BLAS (masked_linear_blas.cpp), its products taken in `type`.
at::Tensor linear_blas(const at::Tensor& x, const at::Tensor& w, const at::Tensor& m, const at::Tensor& b, Gate gate,
                       at::ScalarType type);
at::Tensor linear_backward_blas(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& w, const at::Tensor& m, Gate gate,
                                at::ScalarType type, bool needs_dx, const Sink& dw, const Sink& dm);

}  // namespace metamask::cpu
