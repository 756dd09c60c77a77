// Launchers of the ops on packed masks: they choose one kernel from types, sizes and pointers known at run time.
#include "cuda/kernels/packed.h"

#include "cuda/kernels/pack_mask.cuh"
#include "cuda/kernels/packed_masked_linear.cuh"
#include "cuda/kernels/packed_superposition_gradient.cuh"
#include "cuda/kernels/split_k.cuh"

namespace metamask::cuda {
namespace {

PackedSizes sizes_of(const PackedCase& given) {
  const int64_t tiles = ceil_div(given.out / given.groups, kRowsOfTile);
  return {given.rows(), given.rows_per_sample, given.groups, given.out, given.in, given.tasks, tiles};
}

int64_t forward_windows(const PackedCase& given) {
  return ceil_div(given.rows(), given.param == Type::kFloat64 ? kPackedRoom<double> : kPackedRoom<float>);
}
int64_t backward_blocks(const PackedCase& given) {
  return ceil_div(given.in, 8 * kChunk) *
         ceil_div(given.rows(), given.param == Type::kFloat64 ? kPackedBackwardRoom<double> : kPackedBackwardRoom<float>);
}

Share forward_share(const PackedCase& given) {
  return share(given.in, kWarps * kColumnsOfStep, forward_windows(given) * given.groups * sizes_of(given).tiles);
}
Share backward_share(const PackedCase& given) {
  return share(given.out / given.groups, kWarps * 4 * 2, backward_blocks(given) * given.groups);
}
Share superposition_share(const PackedCase& given) {
  return share(given.out, 1, ceil_div(given.tasks, kSuperposedTasks) * ceil_div(given.samples, kSuperposedSamples));
}

}  // namespace

void pack_mask(Type type, const void* logits, double threshold, uint8_t* packed, int64_t rows, int64_t columns,
               cudaStream_t stream) {
  const int64_t n = rows * ceil_div(columns, 8);
  if (n == 0) return;
  with_type(type, [&]<class P>(Tag<P>) {
    launch(pack_mask_kernel<P>, grid_of(ceil_div(n, kThreads)), dim3(kThreads), 0, stream, in<P>(logits), Compute<P>(threshold),
           packed, rows, columns);
  });
}

void unpack_mask(const uint8_t* packed, bool* mask, int64_t rows, int64_t columns, cudaStream_t stream) {
  const int64_t n = rows * columns;
  if (n == 0) return;
  launch(unpack_mask_kernel, grid_of(ceil_div(n, kThreads)), dim3(kThreads), 0, stream, packed, mask, rows, columns);
}

int64_t packed_masked_linear_workspace(const PackedCase& given) {
  if (given.rows() == 0 || given.out == 0) return 0;
  const Share shared = forward_share(given);
  return shared.count > 1 ? shared.count * given.rows() * given.out * compute_bytes(given.param) : 0;
}

int64_t packed_input_gradient_workspace(const PackedCase& given) {
  if (given.rows() == 0 || given.in == 0) return 0;
  const Share shared = backward_share(given);
  return shared.count > 1 ? shared.count * given.rows() * given.groups * given.in * compute_bytes(given.param) : 0;
}

int64_t packed_superposition_workspace(const PackedCase& given) {
  if (given.samples == 0 || given.tasks == 0) return 0;
  return superposition_share(given).count * given.samples * given.tasks * compute_bytes(given.param);
}

void packed_masked_linear(const PackedCase& given, const int64_t* slots, const void* w, const PerTask& bits, const void* bias,
                          const PerTask& bias_bits, const void* x, void* y, void* workspace, cudaStream_t stream) {
  const PackedSizes sizes = sizes_of(given);
  if (sizes.rows == 0 || sizes.out == 0) return;
  with_type(given.param, [&]<class P>(Tag<P>) {
    using T = Compute<P>;
    const Share shared = forward_share(given);
    const dim3 grid = grid_of(forward_windows(given), given.groups * sizes.tiles, shared.count);
    T* split_k_sums = shared.count > 1 ? out<T>(workspace) : nullptr;
    with_alignment(rows_aligned<P, T>(given.in, w, x), [&]<bool kAligned>() {
      launch(packed_masked_linear_kernel<kAligned, P>, grid, dim3(kBlock), 0, stream, sizes, slots, in<P>(w), bits, in<T>(bias),
             bias_bits, in<T>(x), out<T>(y), split_k_sums, shared.each);
    });
    if (split_k_sums != nullptr) add_split_k<T>(split_k_sums, nullptr, y, shared.count, sizes.rows, sizes.out, stream);
  });
}

void packed_input_gradient(const PackedCase& given, const int64_t* slots, const void* w, const PerTask& bits, const void* dy,
                           void* dx, void* workspace, cudaStream_t stream) {
  const PackedSizes sizes = sizes_of(given);
  if (sizes.rows == 0 || sizes.in == 0) return;
  with_type(given.param, [&]<class P>(Tag<P>) {
    using T = Compute<P>;
    const Share shared = backward_share(given);
    const dim3 grid = grid_of(backward_blocks(given), shared.count, given.groups);
    T* split_k_sums = shared.count > 1 ? out<T>(workspace) : nullptr;
    with_alignment(rows_aligned<P, T>(given.in, w), [&]<bool kAligned>() {
      launch(packed_input_gradient_kernel<kAligned, P>, grid, dim3(kBlock), 0, stream, sizes, slots, in<P>(w), bits, in<T>(dy),
             out<T>(dx), split_k_sums, shared.each);
    });
    if (split_k_sums != nullptr)
      add_split_k<T>(split_k_sums, nullptr, dx, shared.count, sizes.rows, sizes.groups * sizes.in, stream);
  });
}

void packed_weight_gradient(const PackedCase& given, const int64_t* slots, const PerTask& bits, const void* dy, const void* x,
                            void* dw, cudaStream_t stream) {
  const PackedSizes sizes = sizes_of(given);
  if (sizes.out == 0 || sizes.in == 0) return;
  with_type(given.param, [&]<class P>(Tag<P>) {
    using T = Compute<P>;
    const dim3 grid = grid_of(ceil_div(given.in, 8 * kChunk), ceil_div(given.out / given.groups, kWarps * 4 * 2), given.groups);
    with_alignment(rows_aligned<P, T>(given.in, x, dw), [&]<bool kAligned>() {
      launch(packed_weight_gradient_kernel<kAligned, P>, grid, dim3(kBlock), 0, stream, sizes, slots, bits, in<T>(dy), in<T>(x),
             out<P>(dw));
    });
  });
}

void packed_superposition_gradient(const PackedCase& given, const void* w, const PerTask& bits, const void* dy, const void* x,
                                   void* result, void* workspace, cudaStream_t stream) {
  if (given.samples == 0 || given.tasks == 0) return;
  const PackedSizes sizes = sizes_of(given);
  with_type(given.param, [&]<class P>(Tag<P>) {
    using T = Compute<P>;
    const Share shared = superposition_share(given);
    const dim3 grid = grid_of(ceil_div(given.tasks, kSuperposedTasks), ceil_div(given.samples, kSuperposedSamples), shared.count);
    T* split_k_sums = out<T>(workspace);
    launch(packed_superposition_kernel<P>, grid, dim3(kBlock), 0, stream, sizes, in<P>(w), bits, in<T>(dy), in<T>(x), split_k_sums,
           given.samples, shared.each);
    add_split_k<T>(split_k_sums, nullptr, result, shared.count, given.samples, given.tasks, stream);
  });
}

}  // namespace metamask::cuda
