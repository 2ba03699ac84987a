// Marks a function for both sides. Under a host compiler, the emulator's included, it is just
// inline.
#pragma once

#if defined(__CUDACC__)
#define BRN_HD __host__ __device__ __forceinline__
#else
#define BRN_HD inline
#endif
