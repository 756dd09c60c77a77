// The variables that CUDA gives every thread; the scheduler sets them. Hidden: a process may hold two builds, each with its own.
#pragma once

#include <vector_types.h>

[[gnu::visibility("hidden")]] inline uint3 threadIdx, blockIdx;
[[gnu::visibility("hidden")]] inline dim3 blockDim, gridDim;
