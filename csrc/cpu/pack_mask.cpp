// pack_mask and unpack_mask on the CPU: between logits and one bit a weight. Bit k % 8 of byte k / 8 of a row is its weight k; the
// padding of a row is zero.
#include <torch/library.h>

#include <algorithm>

#include "cpu/kernels/storage.h"
#include "cpu/masked_weight.h"
#include "ops/packed.h"

namespace metamask::cpu {
namespace {

float value(float x) { return x; }
double value(double x) { return x; }
template <class S>
float value(S x) {
  return widen(x);
}

template <class Row>
void each_row(int64_t rows, int64_t columns, const Row& row) {
  if (columns == 0) return;
  at::parallel_for(0, rows, std::max<int64_t>(kGrain / std::max<int64_t>(columns, 1), 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) row(i);
  });
}

template <class S, class T>
void pack_rows(const void* logits, T threshold, uint8_t* packed, int64_t rows, int64_t columns) {
  const int64_t bytes = packed_bytes(columns);
  each_row(rows, columns, [&](int64_t i) {
    const S* from = static_cast<const S*>(logits) + i * columns;
    for (int64_t b = 0; b < bytes; ++b) {
      const int64_t n = std::min<int64_t>(columns - 8 * b, 8);
      unsigned byte = 0;
      for (int64_t k = 0; k < n; ++k) byte |= unsigned(value(from[8 * b + k]) > threshold) << k;
      packed[i * bytes + b] = uint8_t(byte);
    }
  });
}

at::Tensor pack_mask(const at::Tensor& mask_logits, double threshold) {
  check_pack_mask(mask_logits, threshold);
  const at::Tensor logits = mask_logits.contiguous();
  const int64_t rows = packed_rows(logits.sizes()), columns = packed_columns(logits.sizes());
  at::Tensor packed = at::empty(packed_shape(logits.sizes()), logits.options().dtype(at::kByte));
  const void* from = data("mask_logits", logits);
  uint8_t* to = mutable_data<uint8_t>("packed", packed);
  switch (type_of(logits.scalar_type())) {
    case Type::kFloat64: pack_rows<double>(from, threshold, to, rows, columns); break;
    case Type::kFloat32: pack_rows<float>(from, float(threshold), to, rows, columns); break;
    case Type::kBFloat16: pack_rows<BFloat16>(from, float(threshold), to, rows, columns); break;
    case Type::kFloat16: pack_rows<Float16>(from, float(threshold), to, rows, columns); break;
  }
  return packed;
}

at::Tensor unpack_mask(const at::Tensor& packed, at::IntArrayRef shape) {
  check_unpack_mask(packed, shape);
  const at::Tensor bits = packed.contiguous();
  const int64_t columns = packed_columns(shape), bytes = packed_bytes(columns);
  at::Tensor mask = at::empty(shape, packed.options().dtype(at::kBool));
  const uint8_t* from = data<uint8_t>("packed", bits);
  bool* to = mutable_data<bool>("mask", mask);
  each_row(packed_rows(shape), columns, [&](int64_t i) {
    for (int64_t k = 0; k < columns; ++k) to[i * columns + k] = from[i * bytes + k / 8] >> (k % 8) & 1;
  });
  return mask;
}

}  // namespace

TORCH_LIBRARY_IMPL(metamask, CPU, library) {
  library.impl("pack_mask", &pack_mask);
  library.impl("unpack_mask", &unpack_mask);
}

}  // namespace metamask::cpu
