// task_masked_linear and its derivatives on the CPU, by panels as masked_linear: a tile of W serves all tasks of the batch in turn,
// so that W is read from memory once, and the gradient of W is added up where the tile is. Of theta and its gradients there is only
// ever one tile, of one task. The rows of a task are one matrix (segments.h). Tasks of so many rows that a panel's passes over them
// cost more than their products go through BLAS one after the other, as masked_linear does (cpu/products.h).
#include "ops/task_masked_linear.h"

#include "cpu/products.h"
#include "cpu/segments.h"

namespace metamask::cpu {
namespace {

// The size of a tile: all tiles of a pass (theta; theta and its gradient; four of them), with what streams by, take about a quarter
// of the second-level cache.
int64_t tile_bytes(int64_t tiles) { return second_level_cache() / (8 * tiles); }
// Whole rows forward, many rows backward (docs/internals/performance.md).
constexpr int64_t kForwardRow = 64 * 1024, kBackwardRow = 4 * 1024;

template <class T>
T* offset(T* base, int64_t elements) {
  return base == nullptr ? nullptr : base + elements;
}

// Returns uninitialised gradients in the form of `masks`, with zeros for the tasks that the batch does not have.
TaskArrays gradients_like(const TaskArrays& masks, const Segments& segments) {
  TaskArrays made{{}, masks.stacked, masks.tasks, masks.bytes, masks.type};
  if (masks.stacked) {
    made.tensors.push_back(Cpu::gradient_like(masks.tensors[0], at::MemoryFormat::Contiguous));  // it may be expanded
    for (int64_t task = 0; task < masks.tasks; ++task) {
      if (masks.bytes > 0 && !segments.uses(task)) std::memset(made.mutable_data(task), 0, masks.bytes);
    }
    return made;
  }
  made.tensors.reserve(masks.tensors.size());
  for (int64_t task = 0; task < masks.tasks; ++task) {
    const at::Tensor& mask = masks.tensors[task];
    made.tensors.push_back(segments.uses(task) ? Cpu::gradient_like(mask) : at::zeros_like(mask));
  }
  return made;
}

// Returns the arrays of the batch's tasks, in the order of the segments; null pointers if there are none.
std::vector<const void*> of_segments(const TaskArrays& arrays, const Segments& segments) {
  std::vector<const void*> pointers(segments.size(), nullptr);
  for (int64_t i = 0; arrays.given() && i < segments.size(); ++i) pointers[i] = arrays.data(segments[i].task);
  return pointers;
}

std::vector<void*> of_segments(TaskArrays& arrays, const Segments& segments) {
  std::vector<void*> pointers(segments.size(), nullptr);
  for (int64_t i = 0; arrays.given() && i < segments.size(); ++i) pointers[i] = arrays.mutable_data(segments[i].task);
  return pointers;
}

// The sum, in the type of the arithmetic, that becomes the gradient of a parameter that the tasks share.
template <class T>
struct Sum {
  at::Tensor total;

  Sum(const at::Tensor& parameter, bool wanted) {
    if (!wanted) return;
    total = parameter.scalar_type() == kScalar<T> ? Cpu::gradient_like(parameter)
                                                  : at::empty(parameter.sizes(), parameter.options().dtype(kScalar<T>));
  }

  T* data() { return mutable_data<T>("gradient", total); }
  at::Tensor as(at::ScalarType type) const { return total.defined() ? total.to(type) : total; }
};

template <class T>
struct TaskLinear {
  static constexpr int64_t kPad = kRowBytes / int64_t(sizeof(T));

  const TaskArguments& given;
  const Gate gate = given.gate;
  const int64_t out = given.weight.size(0), in = given.weight.size(1), bytes = given.weight.element_size(), groups = given.groups;
  // Rows of x and of tiles are padded for gemm. Of one column, a tile is a vector, and padding would be most of the work.
  const bool is_vector = in == 1;
  const int64_t pad = is_vector ? 1 : kPad;
  const int64_t group_out = std::max<int64_t>(out / groups, 1);
  const ParamTypes types{type_of(given.weight.scalar_type()), given.masks.type}, bias_types{types.weight, given.bias_masks.type};
  const int64_t mask_bytes = bytes_of(types.mask), bias_mask_bytes = bytes_of(bias_types.mask);
  const void *weight = data("weight", given.weight), *bias = data("bias", given.bias);
  const Segments segments{given.slots, given.masks.tasks, given.rows_per_sample};
  const std::vector<const void*> masks = of_segments(given.masks, segments), bias_masks = of_segments(given.bias_masks, segments);

  Panels panels(int64_t tiles, int64_t row_bytes) const {
    return Panels(out, in, segments.rows, sizeof(T), tile_bytes(tiles), row_bytes, segments.size());
  }

  bool blas(Pass pass) const {
    return groups == 1 && tasks_through_blas(pass, kScalar<T>, segments.rows, segments.size(), in, out);
  }

  at::Tensor empty(int64_t rows, int64_t columns) const {
    return at::empty({rows, columns}, given.weight.options().dtype(kScalar<T>));
  }

  // Returns the rows of a task as a matrix that BLAS takes.
  at::Tensor rows_of(const Segment& s, const OrderedRows<T>& from, int64_t columns) const {
    return at::from_blob(const_cast<T*>(from.data) + s.begin * from.row, {s.rows, columns}, {from.row, 1},
                         given.weight.options().dtype(kScalar<T>));
  }

  // Makes the whole theta of a task.
  void build_theta(int64_t task, const at::Tensor& theta) const {
    Cpu::forward(gate, types, kType<T>, weight, masks[task], mutable_data<T>("theta", theta), out * in);
  }

  // Adds each task's x theta^T to its rows of y.
  void forward_blas(const OrderedRows<T>& x, const at::Tensor& y) const {
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor theta = empty(out, in);
    for (int64_t task = 0; task < segments.size(); ++task) {
      build_theta(task, theta);
      y.narrow(0, segments[task].begin, segments[task].rows).addmm_(rows_of(segments[task], x, in), theta.t());
    }
  }

  // Returns dx in the segments' order, if it is wanted; adds to dw and writes each dm that is not null.
  at::Tensor backward_blas(const OrderedRows<T>& dy, const OrderedRows<T>& x, bool needs_dx, bool needs_g, T* dw,
                           const std::vector<void*>& dm) const {
    const at::AutoDispatchBelowADInplaceOrView below;
    at::Tensor g = needs_g ? empty(out, in) : at::Tensor(), dx = needs_dx ? empty(segments.rows, in) : at::Tensor();
    const at::Tensor theta = needs_dx ? empty(out, in) : at::Tensor();
    T *g_data = mutable_data<T>("g", g), *theta_data = mutable_data<T>("theta", theta);
    if (dw != nullptr) std::fill_n(dw, out * in, T(0));
    for (int64_t task = 0; task < segments.size(); ++task) {
      const Segment& s = segments[task];
      const at::Tensor dy_rows = rows_of(s, dy, out);
      if (needs_g) {
        at::mm_out(g, dy_rows.t(), rows_of(s, x, in));
        at::parallel_for(0, out * in, kGrain, [&](int64_t begin, int64_t end) {
          masked_weight_kernels().backward_add(gate, types, g_data + begin, at_element(weight, begin, bytes),
                                               at_element(masks[task], begin, mask_bytes), offset(theta_data, begin),
                                               offset(dw, begin), at_element(dm[task], begin, mask_bytes), end - begin);
        });
      } else if (needs_dx) {
        build_theta(task, theta);
      }
      if (!needs_dx) continue;
      at::Tensor part = dx.narrow(0, s.begin, s.rows);
      at::mm_out(part, dy_rows, theta);
    }
    return dx;
  }

  // Calls work(group, first row, number) for the rows of a panel in each group of columns of x.
  template <class Work>
  void each_group(const Tile& tile, const Work& work) const {
    for (int64_t row = tile.first, end = tile.first + tile.rows, n; row < end; row += n) {
      const int64_t group = row / group_out;
      n = std::min((group + 1) * group_out, end) - row;
      work(group, row, n);
    }
  }

  // Calls work(element of the parameters, element of the tiles, number) over a tile. Whole rows are worked on at once: short ones
  // one by one would cost more in calls than in arithmetic. So the padding is taken out of `read`, and put, as zeros, into
  // `written`.
  template <class Work>
  void each_piece(const Tile& tile, std::initializer_list<T*> read, std::initializer_list<T*> written, const Work& work) const {
    const bool whole = tile.columns == tile.in;
    for (T* t : read) {
      if (!whole || tile.tile_row == tile.in || t == nullptr) continue;
      for (int64_t i = 1; i < tile.rows; ++i) std::memmove(t + i * tile.in, t + i * tile.tile_row, tile.in * sizeof(T));
    }
    if (whole) work(tile.first * tile.in, 0, tile.rows * tile.in);
    else tile.each_piece(work);
    const int64_t padding = round_up(tile.columns, pad) - tile.columns;
    for (T* t : written) {
      if (padding == 0 || t == nullptr) continue;
      for (int64_t i = tile.rows - 1; i >= 0; --i) {
        if (whole) std::memmove(t + i * tile.tile_row, t + i * tile.in, tile.in * sizeof(T));
        std::fill_n(t + i * tile.tile_row + tile.columns, padding, T(0));
      }
    }
  }

  void build_theta(const Tile& tile, int64_t task, T* theta) const {
    each_piece(tile, {}, {theta}, [&](int64_t element, int64_t at, int64_t n) {
      masked_weight_kernels().forward(gate, types, kType<T>, at_element(weight, element, bytes),
                                      at_element(masks[task], element, mask_bytes), theta + at, 0, n);
    });
  }

  // Takes the gradient g of theta through the gate: adds to dw, writes dm, and makes theta.
  void backward_tile(const Tile& tile, int64_t task, T* g, T* theta, T* dw, void* dm) const {
    each_piece(tile, {g}, {theta}, [&](int64_t element, int64_t at, int64_t n) {
      masked_weight_kernels().backward_add(gate, types, g + at, at_element(weight, element, bytes),
                                           at_element(masks[task], element, mask_bytes), offset(theta, at), offset(dw, element),
                                           at_element(dm, element, mask_bytes), n);
    });
  }

  static void clear(const Tile& tile, T* dw) {
    for (int64_t i = 0; dw != nullptr && i < tile.rows; ++i) {
      std::fill_n(dw + (tile.first + i) * tile.in + tile.column, tile.columns, T(0));
    }
  }

  // y[rows of the task, rows of the tile] += x tile^T.
  void multiply(const Tile& tile, int64_t task, const OrderedRows<T>& x, const T* t, T* y) const {
    const Segment& s = segments[task];
    each_group(tile, [&](int64_t group, int64_t row, int64_t n) {
      if (is_vector) {
        const T* const column = t + (row - tile.first);
        for (int64_t i = s.begin; i < s.begin + s.rows; ++i) {
          const T factor = x.data[i * x.row + group * x.group];
          T* const to = y + i * out + row;
          for (int64_t j = 0; j < n; ++j) to[j] += factor * column[j];
        }
        return;
      }
      gemm_kernels<T>().gemm_nt(x.data + s.begin * x.row + group * x.group + tile.column, x.row,
                                t + (row - tile.first) * tile.tile_row, tile.tile_row, y + s.begin * out + row, out, s.rows, n,
                                round_up(tile.columns, pad));
    });
  }

  // The gradient of theta: tile = dy^T x over the rows of the task.
  void gradient(const Tile& tile, int64_t task, const OrderedRows<T>& dy, const OrderedRows<T>& x, T* t) const {
    const Segment& s = segments[task];
    each_group(tile, [&](int64_t group, int64_t row, int64_t n) {
      if (is_vector) {
        T* const column = t + (row - tile.first);
        std::fill_n(column, n, T(0));
        for (int64_t i = s.begin; i < s.begin + s.rows; ++i) {
          const T factor = x.data[i * x.row + group * x.group];
          const T* const from = dy.data + i * dy.row + row;
          for (int64_t j = 0; j < n; ++j) column[j] += factor * from[j];
        }
        return;
      }
      gemm_kernels<T>().gemm_nn(
          dy.data + s.begin * dy.row + row, 1, dy.row, x.data + s.begin * x.row + group * x.group + tile.column, x.row,
          t + (row - tile.first) * tile.tile_row, tile.tile_row, n, s.rows, round_up(tile.columns, pad), false);
    });
  }

  // dx[rows of the task] += dy tile, in the columns of the tile; dx has the rows of `x`.
  void add_to_input(const Tile& tile, int64_t task, const OrderedRows<T>& dy, const T* t, const OrderedRows<T>& x, T* dx) const {
    const Segment& s = segments[task];
    each_group(tile, [&](int64_t group, int64_t row, int64_t n) {
      if (is_vector) {
        const T* const column = t + (row - tile.first);
        for (int64_t i = s.begin; i < s.begin + s.rows; ++i) {
          const T* const from = dy.data + i * dy.row + row;
          T sum = 0;
          for (int64_t j = 0; j < n; ++j) sum += from[j] * column[j];
          dx[i * x.row + group * x.group] += sum;
        }
        return;
      }
      gemm_kernels<T>().gemm_nn(dy.data + s.begin * dy.row + row, dy.row, 1, t + (row - tile.first) * tile.tile_row, tile.tile_row,
                                dx + s.begin * x.row + group * x.group + tile.column, x.row, s.rows, n, round_up(tile.columns, pad),
                                true);
    });
  }

  // Adds up the threads' dx, in the order of the threads, and returns it as the rows of the batch.
  at::Tensor input_gradient(T* dx, int64_t threads, const OrderedRows<T>& x) const {
    at::Tensor total = at::empty({segments.rows, groups * in}, given.weight.options().dtype(kScalar<T>));
    T* data = mutable_data<T>("gradient of input", total);
    add_threads(dx, threads, segments.rows, x.row, x.row, [&](int64_t i, const T* sum) {
      T* to = data + segments.source(i) * groups * in;
      for (int64_t group = 0; group < groups; ++group) std::copy_n(sum + group * x.group, in, to + group * in);
    });
    return total;
  }

  // Fills y[rows of the task, rows of the panel]: with a row of the bias, or zeros.
  void fill(int64_t task, int64_t first, int64_t n, const T* row, T* y) const {
    const Segment& s = segments[task];
    for (int64_t i = s.begin; i < s.begin + s.rows; ++i) {
      if (row == nullptr) std::fill_n(y + i * out + first, n, T(0));
      else std::copy_n(row, n, y + i * out + first);
    }
  }

  // Sums the task's rows of dy: the gradient of its bias.
  void sum_rows(int64_t task, int64_t first, int64_t n, const OrderedRows<T>& dy, T* sum) const {
    const Segment& s = segments[task];
    std::fill_n(sum, n, T(0));
    for (int64_t i = s.begin; i < s.begin + s.rows; ++i) {
      for (int64_t j = 0; j < n; ++j) sum[j] += dy.data[i * dy.row + first + j];
    }
  }

  // Returns a vector [out] that all tasks share, as T: the bias without masks, or its cotangent.
  static at::Tensor shared_row(const at::Tensor& row) { return row.defined() ? row.to(kScalar<T>) : row; }

  at::Tensor forward(const at::Tensor& input) const {
    const OrderedRows<T> x(input, segments, groups, in, pad);
    at::Tensor y = at::empty({segments.rows, out}, input.options().dtype(kScalar<T>));
    if (y.numel() == 0) return y;
    const bool masked_bias = given.bias_masks.given();
    const at::Tensor plain_bias = masked_bias ? at::Tensor() : shared_row(given.bias);
    const T* const plain = data<T>("bias", plain_bias);
    const Panels panels = this->panels(1, kForwardRow);
    const int64_t tile_row = round_up(panels.columns, pad), tile_size = panels.rows * tile_row;
    const int64_t scratch_size = tile_size + round_up(panels.rows, kPad);
    T* y_data = mutable_data<T>("y", y);
    const bool blas = this->blas(Pass::kForward);
    panels.run([&](int64_t, int64_t first, int64_t rows) {
      T *theta = thread_tiles<T>(scratch_size), *row = theta + tile_size;
      for (int64_t task = 0; task < segments.size(); ++task) {
        if (masked_bias) {
          masked_weight_kernels().forward(gate, bias_types, kType<T>, at_element(bias, first, bytes),
                                          at_element(bias_masks[task], first, bias_mask_bytes), row, 0, rows);
        }
        fill(task, first, rows, masked_bias ? row : offset(plain, first), y_data);
      }
      if (blas) return;
      for (int64_t column = 0; column < in; column += panels.columns) {
        const Tile tile{first, rows, column, std::min(panels.columns, in - column), in, tile_row};
        for (int64_t task = 0; task < segments.size(); ++task) {
          build_theta(tile, task, theta);
          multiply(tile, task, x, theta, y_data);
        }
      }
    });
    if (blas) forward_blas(x, y);
    return segments.template put_back<T>(y);
  }

  TaskGradients backward(const at::Tensor& grad, const at::Tensor& input, std::array<bool, 5> output_mask) const {
    const OrderedRows<T> dy(grad, segments, 1, out, 1), x(input, segments, groups, in, pad);
    const bool has_bias = given.bias.defined(), masked_bias = given.bias_masks.given();
    Sum<T> dw(given.weight, output_mask[1]), db(given.bias, has_bias && output_mask[3]);
    TaskGradients made;
    if (output_mask[2]) made.masks = gradients_like(given.masks, segments);
    if (output_mask[4] && masked_bias) made.bias_masks = gradients_like(given.bias_masks, segments);
    const std::vector<void*> dm = of_segments(made.masks, segments), dbm = of_segments(made.bias_masks, segments);
    T *dw_data = dw.data(), *db_data = db.data();
    const bool needs_g = output_mask[1] || output_mask[2], needs_bias = db_data != nullptr || made.bias_masks.given();

    const Panels panels = this->panels(2, kBackwardRow);
    const int64_t tile_row = round_up(panels.columns, pad), tile_size = panels.rows * tile_row;
    const int64_t scratch_size = 2 * tile_size + round_up(panels.rows, kPad);
    const bool blas = this->blas(Pass::kBackward);
    const int64_t dx_size = output_mask[0] && !blas ? segments.rows * x.row : 0;
    const Scratch<T> dx(panels.threads * dx_size);
    std::fill_n(dx.data, panels.threads * dx_size, T(0));
    panels.run([&](int64_t thread, int64_t first, int64_t rows) {
      T *g = thread_tiles<T>(scratch_size), *theta = g + tile_size, *row = theta + tile_size;
      if (db_data != nullptr) std::fill_n(db_data + first, rows, T(0));
      for (int64_t task = 0; needs_bias && task < segments.size(); ++task) {
        sum_rows(task, first, rows, dy, row);
        if (masked_bias) {
          masked_weight_kernels().backward_add(gate, bias_types, row, at_element(bias, first, bytes),
                                               at_element(bias_masks[task], first, bias_mask_bytes), nullptr,
                                               offset(db_data, first), at_element(dbm[task], first, bias_mask_bytes), rows);
        } else {
          for (int64_t j = 0; j < rows; ++j) db_data[first + j] += row[j];
        }
      }
      if (blas) return;
      for (int64_t column = 0; column < in; column += panels.columns) {
        const Tile tile{first, rows, column, std::min(panels.columns, in - column), in, tile_row};
        clear(tile, dw_data);
        for (int64_t task = 0; task < segments.size(); ++task) {
          if (needs_g) {
            gradient(tile, task, dy, x, g);
            backward_tile(tile, task, g, output_mask[0] ? theta : nullptr, dw_data, dm[task]);
          } else if (output_mask[0]) {
            build_theta(tile, task, theta);
          }
          if (output_mask[0]) add_to_input(tile, task, dy, theta, x, dx.data + thread * dx_size);
        }
      }
    });
    if (blas) {
      const at::Tensor ordered = backward_blas(dy, x, output_mask[0], needs_g, dw_data, dm);
      if (output_mask[0]) made.input = segments.template put_back<T>(ordered);
    } else if (output_mask[0]) {
      made.input = input_gradient(dx.data, panels.threads, x);
    }
    made.weight = dw.as(given.weight.scalar_type());
    if (has_bias) made.bias = db.as(given.bias.scalar_type());
    return made;
  }

  std::pair<at::Tensor, TaskGradients> double_backward(const TaskGradients& cotangents, const at::Tensor& grad,
                                                       const at::Tensor& input, std::array<bool, 6> output_mask) const {
    const OrderedRows<T> dy(grad, segments, 1, out, 1), x(input, segments, groups, in, pad);
    const bool has_x = cotangents.input.defined(), has_parameters = cotangents.weight.defined() || cotangents.masks.given();
    std::optional<OrderedRows<T>> cx;
    if (has_x) cx.emplace(cotangents.input, segments, groups, in, pad);
    const bool has_bias = given.bias.defined(), masked_bias = given.bias_masks.given();
    const void* const a = data("cotangent_weight", cotangents.weight);
    const void* const a_bias = data("cotangent_bias", cotangents.bias);
    const std::vector<const void*> b = of_segments(cotangents.masks, segments),
                                   b_bias = of_segments(cotangents.bias_masks, segments);
    const at::Tensor plain_cotangent = masked_bias ? at::Tensor() : shared_row(cotangents.bias);
    const T* const plain = data<T>("cotangent_bias", plain_cotangent);

    Sum<T> dw(given.weight, output_mask[2]), db(given.bias, has_bias && output_mask[4]);
    TaskGradients made;
    if (output_mask[3]) made.masks = gradients_like(given.masks, segments);
    if (output_mask[5] && masked_bias) made.bias_masks = gradients_like(given.bias_masks, segments);
    const std::vector<void*> dm = of_segments(made.masks, segments), dbm = of_segments(made.bias_masks, segments);
    T *dw_data = dw.data(), *db_data = db.data();
    at::Tensor ddy;
    if (output_mask[0]) ddy = at::empty({segments.rows, out}, given.weight.options().dtype(kScalar<T>));
    T* const ddy_data = mutable_data<T>("gradient of grad", ddy);
    // The tiles that are needed: theta and h meet the cotangent of dx, c and g those of dW and dM.
    const bool needs_w = output_mask[2] || output_mask[3], needs_theta = has_x && output_mask[0], needs_h = has_x && needs_w;
    const bool needs_c = has_parameters && (output_mask[0] || output_mask[1]), needs_g = has_parameters && needs_w;

    const Panels panels = this->panels(4, kBackwardRow);
    const int64_t tile_row = round_up(panels.columns, pad), tile_size = panels.rows * tile_row;
    const int64_t scratch_size = 4 * tile_size + 2 * round_up(panels.rows, kPad);
    const int64_t dx_size = output_mask[1] ? segments.rows * x.row : 0;
    const Scratch<T> dx(panels.threads * dx_size);
    std::fill_n(dx.data, panels.threads * dx_size, T(0));
    panels.run([&](int64_t thread, int64_t first, int64_t rows) {
      T* const tiles = thread_tiles<T>(scratch_size);
      T* const g = needs_g ? tiles : nullptr;
      T* const h = needs_h ? tiles + tile_size : nullptr;
      T* const theta = needs_theta ? tiles + 2 * tile_size : nullptr;
      T* const c = needs_c ? tiles + 3 * tile_size : nullptr;
      T *row = tiles + 4 * tile_size, *c_row = row + round_up(panels.rows, kPad);
      if (db_data != nullptr) std::fill_n(db_data + first, rows, T(0));
      for (int64_t task = 0; task < segments.size(); ++task) {
        if (masked_bias) {
          sum_rows(task, first, rows, dy, row);
          masked_weight_kernels().second_backward_add(
              gate, bias_types, at_element(a_bias, first, bytes), at_element(b_bias[task], first, bias_mask_bytes), row, nullptr,
              at_element(bias, first, bytes), at_element(bias_masks[task], first, bias_mask_bytes), nullptr, c_row,
              offset(db_data, first), at_element(dbm[task], first, bias_mask_bytes), rows);
        }
        if (output_mask[0]) fill(task, first, rows, masked_bias ? c_row : offset(plain, first), ddy_data);
      }
      for (int64_t column = 0; column < in; column += panels.columns) {
        const Tile tile{first, rows, column, std::min(panels.columns, in - column), in, tile_row};
        clear(tile, dw_data);
        for (int64_t task = 0; task < segments.size(); ++task) {
          if (needs_g) gradient(tile, task, dy, x, g);
          if (needs_h) gradient(tile, task, dy, *cx, h);
          each_piece(tile, {g, h}, {theta, c}, [&](int64_t element, int64_t at, int64_t n) {
            masked_weight_kernels().second_backward_add(
                gate, types, at_element(a, element, bytes), at_element(b[task], element, mask_bytes), offset(g, at), offset(h, at),
                at_element(weight, element, bytes), at_element(masks[task], element, mask_bytes), offset(theta, at), offset(c, at),
                offset(dw_data, element), at_element(dm[task], element, mask_bytes), n);
          });
          if (needs_theta) multiply(tile, task, *cx, theta, ddy_data);
          if (needs_c && output_mask[0]) multiply(tile, task, x, c, ddy_data);
          if (needs_c && output_mask[1]) add_to_input(tile, task, dy, c, x, dx.data + thread * dx_size);
        }
      }
    });
    if (output_mask[0]) ddy = segments.template put_back<T>(ddy);
    if (output_mask[1]) made.input = input_gradient(dx.data, panels.threads, x);
    made.weight = dw.as(given.weight.scalar_type());
    if (has_bias) made.bias = db.as(given.bias.scalar_type());
    return {ddy, made};
  }
};

struct CpuTaskLinear : Cpu {
  static bool is_double(const TaskArguments& given) { return given.weight.scalar_type() == at::kDouble; }

  static at::Tensor task_linear(const TaskArguments& given, const at::Tensor& x) {
    if (is_double(given)) return TaskLinear<double>{given}.forward(x);
    return TaskLinear<float>{given}.forward(x).to(x.scalar_type());
  }

  static TaskGradients task_linear_backward(const TaskArguments& given, const at::Tensor& dy, const at::Tensor& x,
                                            std::array<bool, 5> output_mask) {
    return is_double(given) ? TaskLinear<double>{given}.backward(dy, x, output_mask)
                            : TaskLinear<float>{given}.backward(dy, x, output_mask);
  }

  static std::pair<at::Tensor, TaskGradients> task_linear_double_backward(const TaskArguments& given,
                                                                          const TaskGradients& cotangents, const at::Tensor& dy,
                                                                          const at::Tensor& x, std::array<bool, 6> output_mask) {
    return is_double(given) ? TaskLinear<double>{given}.double_backward(cotangents, dy, x, output_mask)
                            : TaskLinear<float>{given}.double_backward(cotangents, dy, x, output_mask);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(metamask, CPU, library) { TaskMaskedLinear<CpuTaskLinear>::register_in(library); }

}  // namespace metamask::cpu
