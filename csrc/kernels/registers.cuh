// What keeps registers for the tile: the compiler computes ahead, before a loop, whatever does not
// change in it, and spills what it then has no register for.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace brn {

// What hangs on the value is computed in this place, each time.
__device__ __forceinline__ void compute_here(int& value) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(value));
#else
  (void)value;
#endif
}
__device__ __forceinline__ void compute_here(std::int64_t& value) {
#if defined(__CUDACC__)
  asm volatile("" : "+l"(value));
#else
  (void)value;
#endif
}

}  // namespace brn
