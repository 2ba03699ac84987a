// The pivots that a slab's channels are reduced around: the mean of their first elements, which
// every warp of the team loads for itself and so has alike.
//
// How far the mean is from the pivot is how coarsely each thread, warp and block rounds what it
// hands on, and where few hand on, that counts. Error of dweight in last places (the parity
// harness's measure, which allows 16), float32, dy of mean 3:
//
//   kChannelsFirst  a block of 25,088 values a channel          around the first element 52, so  9
//   kChannelsLast   13 blocks for 3,136 rows of 32 channels     around the first row     24, so  6
//                   6 blocks, a slab of 64 channels                                      20, so 10
#pragma once

#include "../core/plan.h"
#include "reduce.cuh"
#include "slab.cuh"
#include "vector.cuh"

#include <cuda_runtime.h>

#include <cstdint>

namespace brn {

// Loads of a thread: an element, or slots of rows that lie as far apart as its warp's lanes cover,
// up to 64 / columns of them in all.
template <Layout kLayout>
constexpr int kPivotLoads = kLayout == Layout::kChannelsFirst ? 1 : 2;

// On their way before the tile is. x is at the thread's channels.
template <typename Slot, Layout kLayout, typename T, typename Real, int kLoads, int kChannels>
__device__ __forceinline__ void load_pivots(const T* x, const Problem& p, const Plan& plan,
                                            Real (&pivot)[kLoads][kChannels]) {
  static_assert(kLoads == kPivotLoads<kLayout>, "what settle_pivots() adds up");
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if constexpr (kLayout == Layout::kChannelsFirst) {
    pivot[0][0] = load_element(x + (lane < p.spatial ? lane : p.spatial - 1));
  } else {
    const int last = saturated(p.reduced() - 1);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int row = (i * kWarp + lane) / plan.columns;
      const T* const from = x + (row < last ? row : last) * p.channels;
      Slot::unpack(Slot::template load<Reuse::kByEveryWarp>(from), pivot[i]);
    }
  }
}

// Leaves the thread's pivots in pivot[0], and those of the slab's channels in `shared`. Behind the
// tile's loads: it waits. Equal values give exactly themselves, because they are added pairwise.
template <Layout kLayout, typename Real, int kLoads, int kChannels>
__device__ __forceinline__ void settle_pivots(const Plan& plan, Real (&pivot)[kLoads][kChannels],
                                              Real* shared) {
  const int columns = kLayout == Layout::kChannelsFirst ? 1 : plan.columns;
  const Real share = static_cast<Real>(columns) / Real(kLoads * kWarp);
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    pivot[0][k] *= share;
    if constexpr (kLoads == 2) pivot[0][k] += pivot[1][k] * share;
  }
  for (int distance = kWarp / 2; distance >= columns; distance /= 2) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k)
      pivot[0][k] += __shfl_xor_sync(kAllLanes, pivot[0][k], distance);
  }
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < plan.columns) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) shared[thread * kChannels + k] = pivot[0][k];
  }
}

}  // namespace brn
