// Launchers of the ops on masks of one bit a weight, on raw device pointers to contiguous arrays. Bit k % 8 of byte k / 8 of a row
// is its weight k; the padding of a row is zero. x, dx [rows, groups * in], y, dy [rows, out], in the type of the arithmetic
// (float, or double for float64 parameters), with rows = samples * rows_per_sample; w, dw [out, in] of type `param`; slots
// [samples]; bits [out, ceil(in / 8)] for each task.
#pragma once

#include "cuda/kernels/segments.h"

namespace metamask::cuda {

struct PackedCase {
  Type param;
  int64_t samples, rows_per_sample, groups, out, in, tasks;

  int64_t rows() const { return samples * rows_per_sample; }
};

// `packed` of pack_mask and `mask` of unpack_mask begin at a multiple of kPackBytes.
void pack_mask(Type type, const void* logits, double threshold, uint8_t* packed, int64_t rows, int64_t columns,
               cudaStream_t stream);
void unpack_mask(const uint8_t* packed, bool* mask, int64_t rows, int64_t columns, cudaStream_t stream);

// Return the bytes of the workspaces of the launchers; for 0 the pointer may be null.
int64_t packed_masked_linear_workspace(const PackedCase& given);
int64_t packed_input_gradient_workspace(const PackedCase& given);
int64_t packed_superposition_workspace(const PackedCase& given);

// bias [out] in the type of the arithmetic, null: none; bias_bits [ceil(out / 8)] for each task, none: the bias is not masked.
void packed_masked_linear(const PackedCase& given, const int64_t* slots, const void* w, const PerTask& bits, const void* bias,
                          const PerTask& bias_bits, const void* x, void* y, void* workspace, cudaStream_t stream);
void packed_input_gradient(const PackedCase& given, const int64_t* slots, const void* w, const PerTask& bits, const void* dy,
                           void* dx, void* workspace, cudaStream_t stream);
void packed_weight_gradient(const PackedCase& given, const int64_t* slots, const PerTask& bits, const void* dy, const void* x,
                            void* dw, cudaStream_t stream);

// result [samples, tasks]: for each sample and task, the sum of dy W x over the weights whose bit is set.
void packed_superposition_gradient(const PackedCase& given, const void* w, const PerTask& bits, const void* dy, const void* x,
                                   void* result, void* workspace, cudaStream_t stream);

}  // namespace metamask::cuda
