// The shared memory that a launch brings beside what a kernel declares: places for slots of every
// thread.
#pragma once

#include "../core/geometry.h"

#include <cuda_runtime.h>

namespace brn {

// The place of this thread's slot number `index`. Neighbouring threads side by side, so that a warp
// reaches each bank once. A full block's stride whatever the plan's: it is a constant. The hardware
// places all of it behind the static arrays.
template <int kBytes>
__device__ __forceinline__ unsigned char* shared_place(int index) {
  const int at = (index * kMaxThreads + static_cast<int>(threadIdx.x)) * kBytes;
#if defined(__CUDACC__)
  extern __shared__ uint4 dynamic_shared[];
  return reinterpret_cast<unsigned char*>(dynamic_shared) + at;
#else
  return static_cast<unsigned char*>(::simt::dynamic_shared(at, kBytes));
#endif
}

}  // namespace brn
