// The kernels of planted.cu and the bugs that they can have; tests/emulator/test_emulator.py has the same numbers.
#pragma once

namespace cuda_on_cpu {

enum class Kernel : int { kTwice, kRowSum, kProduct, kPipeline, kTf32Tile, kBFloat16Tile, kFloat16Tile, kLastBlock };

enum class Bug : int {
  kNone,
  kTailOffByOne,
  kMisaligned,
  kUninitialisedSum,
  kReturnBeforeShuffle,
  kWrongLane,
  kPastSharedArray,
  kDivergentBarrier,
  kNoBarrierBeforeRead,
  kBlocksWriteOneWord,
  kUninitialisedAccumulator,
  kColumnBeyondTheEnd,
  kNoBarrierBeforeWrite,
  kNoAsyncWait,
  kNoBarrierAfterAsyncWait,
  kNoBarrierInPipeline,
  kTicketNotAtomic,
  kNoBarrierBeforeTicket,
  kNoFenceBeforeTicket,
  kNoFenceAfterTicket,
  kNoBarrierAfterTicket,
  kCount
};

struct Case {
  Kernel kernel;
  float* out;
  const float *a, *b;
  int m, n, k;
};

void run_planted(Bug bug, const Case& given);

}  // namespace cuda_on_cpu
