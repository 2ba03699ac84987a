// The CUDA runtime without kernels.
#pragma once

#include "../simt/include/cuda_host.h"

inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorMemoryAllocation"; }
inline const char* cudaGetErrorString(cudaError_t) { return "out of memory"; }
