// Marks a function for both sides. Under a host compiler, the emulator's included, it is inline,
// and always: csrc/cpu compiles some for several instruction sets (see sweeps.h).
#pragma once

#if defined(__CUDACC__)
#define BRN_HD __host__ __device__ __forceinline__
#else
#define BRN_HD inline __attribute__((always_inline))
#endif
