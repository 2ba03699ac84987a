// Rounds of a slab that stay in shared memory between the statistics and the normalisation, where
// its registers hold the last one only.
//
// A thread reads back the slots that it stored itself, so no barrier stands between. Slots that do
// not exist are stored too, as the zeros that they were loaded as: that costs no test.
#pragma once

#include "../core/geometry.h"
#include "shared.cuh"
#include "vector.cuh"

#include <cuda_runtime.h>

namespace brn {

// A thread's tiles of those rounds, of kTensors tensors. See Plan::retains().
template <typename Slot, int kSlots, int kTensors>
class Retained {
 public:
  template <typename... Tile>
  __device__ __forceinline__ static void keep(int place, const Tile&... tiles) {
    static_assert(sizeof...(Tile) == kTensors, "one tile a tensor");
#pragma unroll
    for (int v = 0; v < kSlots; ++v) {
      int tensor = 0;
      (Slot::store_shared(at(place, tensor++, v), tiles[v]), ...);
    }
  }

  template <typename... Tile>
  __device__ __forceinline__ static void take(int place, Tile&... tiles) {
    static_assert(sizeof...(Tile) == kTensors, "one tile a tensor");
#pragma unroll
    for (int v = 0; v < kSlots; ++v) {
      int tensor = 0;
      ((tiles[v] = Slot::load_shared(at(place, tensor++, v))), ...);
    }
  }

 private:
  __device__ __forceinline__ static unsigned char* at(int place, int tensor, int v) {
    return shared_place<Slot::kBytes>((place * kTensors + tensor) * kSlots + v);
  }
};

}  // namespace brn
