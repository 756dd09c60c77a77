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

// Replaces the table; calls that run at that time keep the one they began with. An empty table means panels.
void set_products(const std::vector<ProductLine>& lines);

// Whether the line nearest to this product says BLAS. Nothing is timed here: the same table gives the same bits.
bool through_blas(Pass pass, at::ScalarType type, int64_t batch, int64_t in, int64_t out);

}  // namespace metamask::cpu
