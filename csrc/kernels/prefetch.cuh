// The next slab's slots on their way to shared memory, while the team waits at its barrier for this
// one's moments: cp.async, of sm_80 and later.
//
// A thread copies the slots that it will read itself. So its own wait is all that has to stand
// between a copy and its use: what a thread's copies bring is visible to that thread once it has
// waited for them, and to nobody else.
//
// There is one buffer, and a copy into it must not overtake the reading of what the last one
// brought. Copies are as if made by another thread, so program order alone is no promise; the
// block's barriers between take() and fetch(), in slab_merge() and team_barrier(), are.
#pragma once

#include "../core/geometry.h"
#include "shared.cuh"
#include "slab.cuh"
#include "vector.cuh"

#include <cuda_runtime.h>
#if !defined(__CUDACC__)
#include <cuda_pipeline_primitives.h>
#endif

#include <cstddef>
#include <cstdint>

namespace brn {

// Whether kernels that are compiled for this architecture can copy such slots. Where they cannot,
// they load them as if the plan did not say prefetch.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <typename Slot>
constexpr bool kPrefetches = false;
#else
template <typename Slot>
constexpr bool kPrefetches = sizeof(typename Slot::Bits) == Slot::kBytes;
#endif

// Marked like a load with __ldcs: what is read once must not push other tensors out of L2.
template <int kBytes>
__device__ __forceinline__ void copy_async(unsigned char* shared, const void* global) {
#if defined(__CUDACC__)
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  std::uint64_t first_out;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first_out));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;"
                 :
                 : "r"(to), "l"(global), "l"(first_out)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], %2, %3;"
                 :
                 : "r"(to), "l"(global), "n"(kBytes), "l"(first_out)
                 : "memory");
  }
#else
  __pipeline_memcpy_async(shared, global, kBytes);
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#else
  __pipeline_commit();
  __pipeline_wait_prior(0);
#endif
}

// A thread's tiles of the next slab, of kTensors tensors.
template <typename Slot, int kSlots, int kTensors>
class Prefetch {
  static_assert(kTensors * kSlots * Slot::kBytes <= kTileBytes, "kPrefetchBytes hold all threads'");

 public:
  // Starts the copies of this thread's slots of a slab.
  template <Layout kLayout, typename... T>
  __device__ __forceinline__ static void fetch(const Problem& p, int channel0,
                                               const Walk<kLayout, Slot>& walk,
                                               const T*... tensors) {
    static_assert(sizeof...(T) == kTensors, "one pointer a tensor");
    if constexpr (kPrefetches<Slot>) {
      int piece = 0;
      compute_here(piece);
      const int slots = walk.in_range(walk.channels(p, channel0)) ? walk.slots(piece) : 0;
      const Cover<Slot, kLayout> cover = walk.cover(p, channel0);
      Cursor cursor = walk.begin(p, channel0, piece);
      const char* from[] = {at(tensors, cursor)...};
#pragma unroll
      for (int v = 0; v < kSlots; ++v) {
        const bool exists = v < slots && cover.any(cursor.plane_left);
        const std::int64_t bytes = walk.advance(cursor.plane_left);
#pragma unroll
        for (int tensor = 0; tensor < kTensors; ++tensor) {
          if (exists) copy_async<Slot::kBytes>(place(tensor, v), from[tensor]);
          from[tensor] += bytes;
        }
      }
    }
  }

  // Waits for the copies. A slot that does not exist was not copied and is zero.
  template <typename... Tile>
  __device__ __forceinline__ static void take(int slots, Tile&... tiles) {
    static_assert(sizeof...(Tile) == kTensors, "one tile a tensor");
    if constexpr (kPrefetches<Slot>) {
      wait_for_copies();
#pragma unroll
      for (int v = 0; v < kSlots; ++v) {
        int tensor = 0;
        ((tiles[v] = v < slots ? Slot::load_shared(place(tensor, v)) : Slot::zero(), ++tensor),
         ...);
      }
    }
  }

 private:
  __device__ __forceinline__ static unsigned char* place(int tensor, int v) {
    return shared_place<Slot::kBytes>(tensor * kSlots + v);
  }
};

}  // namespace brn
