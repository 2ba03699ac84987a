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

#include "../core/geometry.h"
#include "reduce.cuh"
#include "slab.cuh"
#include "vector.cuh"

#include <cuda_runtime.h>

#include <type_traits>

namespace brn {

// A thread's part of them: an element; in kBundles two, of 64 / lanes a channel; or slots of rows
// that lie as far apart as its warp's lanes cover, up to 64 / columns of them in all. Packed until
// the tile is on its way: to widen them is to wait for them, and the compiler would do that in
// front of the tile's loads, which then leave a way to memory later (SASS, sm_90).
template <typename Slot, Layout kLayout>
class Pivots {
  static constexpr bool kByChannel = by_channel(kLayout);
  static constexpr bool kBundles = kLayout == Layout::kBundles;
  static constexpr int kLoads = kByChannel ? 1 : 2;
  static constexpr int kLanesOfChannel = kWarp / Slot::kLanes;  // kBundles: of a warp
  static constexpr int kChannels = kThreadChannels<Slot, kLayout>;
  using T = typename Slot::Element;
  using Real = typename Slot::Real;
  using Piece = std::conditional_t<kLayout == Layout::kChannelsLast, Slot, brn::Slot<T, sizeof(T)>>;

 public:
  // Starts the loads. x is at the thread's channels, in kBundles at the slab's.
  __device__ __forceinline__ void load(const T* x, const Problem& p, const Plan& plan) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      first_[i] = Piece::template load<Reuse::kByEveryWarp>(element(i, x, p, plan));
  }

  // Asks for what load() will read: of a slab that is in shared memory by then, nothing else would
  // have to come from further than L2.
  __device__ __forceinline__ static void expect(const T* x, const Problem& p, const Plan& plan) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) expect_line(element(i, x, p, plan));
  }

  // Waits for them. Leaves the thread's pivots in `pivot` and those of the slab's channels in
  // `shared`. Equal values give exactly themselves, because they are added pairwise.
  template <typename Walk>
  __device__ __forceinline__ void settle(const Walk& walk, const Plan& plan,
                                         Real (&pivot)[kChannels], Real* shared) {
    if constexpr (kBundles) {
      settle_bundle(walk.owned(), pivot, shared);
    } else {
      settle_own(plan, pivot, shared);
    }
  }

 private:
  __device__ __forceinline__ void settle_own(const Plan& plan, Real (&pivot)[kChannels],
                                             Real* shared) {
    const int columns = kByChannel ? 1 : plan.columns;
    const Real share = static_cast<Real>(columns) / Real(kLoads * kWarp);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) pivot[k] = Real(0);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      keep_packed(first_[i]);
      Real value[kChannels];
      Piece::unpack(first_[i], value);
#pragma unroll
      for (int k = 0; k < kChannels; ++k) pivot[k] += value[k] * share;
    }
    for (int distance = kWarp / 2; distance >= columns; distance /= 2) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k)
        pivot[k] += __shfl_xor_sync(kAllLanes, pivot[k], distance);
    }
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < columns) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) shared[thread * kChannels + k] = pivot[k];
    }
  }

  // A few lanes of the warp have a channel, and others need it.
  __device__ __forceinline__ void settle_bundle(const Owned<kLayout>& owned,
                                                Real (&pivot)[kChannels], Real* shared) {
    Real mine = Real(0);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      keep_packed(first_[i]);
      Real value[1];
      Piece::unpack(first_[i], value);
      mine += value[0] * (Real(1) / Real(kLoads * kLanesOfChannel));
    }
#pragma unroll
    for (int distance = kLanesOfChannel / 2; distance > 0; distance /= 2)
      mine += __shfl_xor_sync(kAllLanes, mine, distance);
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kWarp && thread % kLanesOfChannel == 0) shared[thread / kLanesOfChannel] = mine;
    owned.each(pivot, [&](int c) { return __shfl_sync(kAllLanes, mine, c * kLanesOfChannel); });
  }

  // Where the thread's part number i begins.
  __device__ __forceinline__ static const T* element(int i, const T* x, const Problem& p,
                                                     const Plan& plan) {
    int thread = static_cast<int>(threadIdx.x);
    compute_here(thread);
    const int lane = thread % kWarp;
    if constexpr (kByChannel) {
      const int last = saturated(p.spatial - 1);
      return x + (lane < last ? lane : last);
    } else if constexpr (kBundles) {
      const int value = lane % kLanesOfChannel * kLoads + i;
      const int last = static_cast<int>(p.spatial) - 1;
      return x + lane / kLanesOfChannel * p.spatial + (value < last ? value : last);
    } else {
      const unsigned last = static_cast<unsigned>(saturated(p.reduced() - 1));
      const unsigned row = static_cast<unsigned>(i * kWarp + lane) >> bits_of(plan.columns);
      return x + (row < last ? row : last) * p.channels;
    }
  }

  typename Piece::Bits first_[kLoads];
};

}  // namespace brn
