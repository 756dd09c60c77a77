// Which of two ways a linear op multiplies in: by panels (masked_linear.cpp), or through torch's BLAS (masked_linear_blas.cpp).
#pragma once

#include <ATen/ATen.h>

#include <tuple>
#include <vector>

namespace metamask::cpu {

enum class Pass { kForward, kBackward };

// A line of the table: pass, type of the product, threads, in, out, rows. With so many threads, the pass over a weight of [out, in]
// goes through BLAS from `rows` rows of the batch on.
using ProductLine = std::tuple<Pass, at::ScalarType, int64_t, int64_t, int64_t, int64_t>;

// Replaces the table; calls that run at that time keep the one they began with. Without lines everything goes by panels, and so do
// the tasks of a mixed batch that have fewer than task_rows rows each.
void set_products(const std::vector<ProductLine>& lines, int64_t task_rows);

// Whether the line nearest to this product says BLAS. Nothing is timed here: the same table gives the same bits.
bool through_blas(Pass pass, at::ScalarType type, int64_t batch, int64_t in, int64_t out);

// The same for a mixed-task batch. The passes of panels cost as much as the whole batch is large; what BLAS costs more, a theta for
// each task, is shared by that task's rows.
bool tasks_through_blas(Pass pass, at::ScalarType type, int64_t batch, int64_t tasks, int64_t in, int64_t out);

}  // namespace metamask::cpu
