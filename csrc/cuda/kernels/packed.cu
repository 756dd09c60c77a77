// Launchers of the ops on packed masks: they choose one kernel from types, sizes and pointers known at run time.
#include "cuda/kernels/packed.h"

#include "cuda/kernels/pack_mask.cuh"
#include "cuda/kernels/packed_masked_linear.cuh"
#include "cuda/kernels/packed_masked_linear_backward.cuh"
#include "cuda/kernels/packed_superposition_gradient.cuh"
#include "cuda/kernels/split_k.cuh"

namespace metamask::cuda {
namespace {

PackedSizes sizes_of(const PackedCase& given) {
  return {given.rows(), given.rows_per_sample, given.groups, given.out, given.in, given.tasks};
}

struct ForwardPlan {
  PackedBlocks blocks;
  int parts;

  int64_t count() const { return int64_t(blocks.windows) * blocks.tiles * blocks.groups * parts; }
};

// A block holds its tile of W for as many rows as there are, or for fewer where that leaves multiprocessors without a block.
template <class T>
ForwardPlan forward_plan(const PackedCase& given) {
  constexpr int kFewest = 8;
  const int64_t group_out = given.out / given.groups, tiles = ceil_div(group_out, kPackedTile<T>), strips = kPackedWarps * kStrip;
  int room = kPackedRoom<T>;
  const auto blocks = [&] { return ceil_div(given.rows(), room) * tiles * given.groups; };
  while (room > kFewest && blocks() * ceil_div(given.in, strips) < kPackedResident * multiprocessors()) room /= 2;
  const Share shared = share(given.in, strips, blocks());
  grid_of(blocks() * shared.count);  // so many that a device takes them, and that each number fits in 32 bits
  return {{room, unsigned(ceil_div(given.rows(), room)), unsigned(tiles), unsigned(given.groups), group_out, shared.each},
          shared.count};
}
ForwardPlan forward_plan(const PackedCase& given) {
  return given.param == Type::kFloat64 ? forward_plan<double>(given) : forward_plan<float>(given);
}

int64_t backward_blocks(const PackedCase& given) {
  return ceil_div(given.in, 8 * kChunk) *
         ceil_div(given.rows(), given.param == Type::kFloat64 ? kPackedBackwardRoom<double> : kPackedBackwardRoom<float>);
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
    with_alignment(columns % 8 == 0 && aligned(logits), [&]<bool kAligned>() {
      launch(pack_mask_kernel<kAligned, P>, grid_of(ceil_div(n, kThreads * kPackBytes)), dim3(kThreads), 0, stream, in<P>(logits),
             Compute<P>(threshold), packed, rows, columns);
    });
  });
}

void unpack_mask(const uint8_t* packed, bool* mask, int64_t rows, int64_t columns, cudaStream_t stream) {
  const int64_t n = rows * columns;
  if (n == 0) return;
  with_alignment(columns % 8 == 0, [&]<bool kWhole>() {
    launch(unpack_mask_kernel<kWhole>, grid_of(ceil_div(n, kThreads * kPackBytes)), dim3(kThreads), 0, stream, packed, mask, rows,
           columns);
  });
}

int64_t packed_masked_linear_workspace(const PackedCase& given) {
  if (given.rows() == 0 || given.out == 0) return 0;
  const int parts = forward_plan(given).parts;
  return parts > 1 ? parts * given.rows() * given.out * compute_bytes(given.param) : 0;
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
    const ForwardPlan plan = forward_plan<T>(given);
    T* split_k_sums = plan.parts > 1 ? out<T>(workspace) : nullptr;
    const auto run = [&]<bool kAligned, bool kWhole>() {
      launch(packed_masked_linear_kernel<kAligned, kWhole, P>, grid_of(plan.count()), dim3(kPackedBlock),
             sizeof(PackedShared<T, kWhole>), stream, sizes, slots, in<P>(w), bits, in<T>(bias), bias_bits, in<T>(x), out<T>(y),
             split_k_sums, plan.blocks);
    };
    if (!rows_aligned<P, T>(given.in, w, x)) run.template operator()<false, false>();
    else if (given.in % kStrip != 0 || !bits.packs) run.template operator()<true, false>();
    else run.template operator()<true, true>();
    if (split_k_sums != nullptr) add_split_k<T>(split_k_sums, nullptr, y, plan.parts, sizes.rows, sizes.out, stream);
  });
}

void packed_input_gradient(const PackedCase& given, const int64_t* slots, const void* w, const PerTask& bits, const void* dy,
                           void* dx, void* workspace, cudaStream_t stream) {
  const PackedSizes sizes = sizes_of(given);
  if (sizes.rows == 0 || sizes.in == 0) return;
  with_type(given.param, [&]<class P>(Tag<P>) {
    using T = Compute<P>;
    const Share shared = backward_share(given);
    const Grid grid(backward_blocks(given), shared.count, given.groups);
    T* split_k_sums = shared.count > 1 ? out<T>(workspace) : nullptr;
    with_alignment(rows_aligned<P, T>(given.in, w), [&]<bool kAligned>() {
      launch(packed_input_gradient_kernel<kAligned, P>, grid.blocks(), dim3(kBlock), 0, stream, sizes, slots, in<P>(w), bits,
             in<T>(dy), out<T>(dx), split_k_sums, shared.each, grid);
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
    const Grid grid(ceil_div(given.in, 8 * kChunk), ceil_div(given.out / given.groups, kWarps * 4 * 2), given.groups);
    with_alignment(rows_aligned<P, T>(given.in, x, dw), [&]<bool kAligned>() {
      launch(packed_weight_gradient_kernel<kAligned, P>, grid.blocks(), dim3(kBlock), 0, stream, sizes, slots, bits, in<T>(dy),
             in<T>(x), out<P>(dw), grid);
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
    const Grid grid(ceil_div(given.tasks, kSuperposedTasks), ceil_div(given.samples, kSuperposedSamples), shared.count);
    T* split_k_sums = out<T>(workspace);
    launch(packed_superposition_kernel<P>, grid.blocks(), dim3(kBlock), 0, stream, sizes, in<P>(w), bits, in<T>(dy), in<T>(x),
           split_k_sums, given.samples, shared.each, grid);
    add_split_k<T>(split_k_sums, nullptr, result, shared.count, given.samples, given.tasks, stream);
  });
}

}  // namespace metamask::cuda
