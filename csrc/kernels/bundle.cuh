// The reduction of a bundle over a block: threads hold lanes, of two channels at most, and the
// place of the boundary between them differs from column to column.
//
// Each thread puts the lanes of either channel together and leaves two records; a warp a channel
// merges those of its columns, and of each row of the block's pass. Which record meets which
// depends on the plan alone.
#pragma once

#include "../core/geometry.h"
#include "reduce.cuh"
#include "slab.cuh"

#include <cuda_runtime.h>

namespace brn {

// What the lanes that belong to the first of a thread's channels, or to the second, come to
// together. About the mean of one of them, which is near those of all.
template <typename Real, int kLanes>
__device__ __forceinline__ Moments<Real> of_lanes(const MomentsOf<Real, kLanes>& lanes, int split,
                                                  bool second) {
  const Real centre = second ? lanes.mean[kLanes - 1] : lanes.mean[0];
  Real count = Real(0);
  Real sum = Real(0);
  Real squares = Real(0);
  Real m2 = Real(0);
#pragma unroll
  for (int k = 0; k < kLanes; ++k) {
    const bool counts = (k < split) != second;
    const Real delta = counts ? lanes.mean[k] - centre : Real(0);
    count += counts ? Real(1) : Real(0);
    sum += delta;
    squares += delta * delta;
    m2 += counts ? lanes.m2[k] : Real(0);
  }
  const Real further = count > Real(0) ? sum / count : Real(0);
  const Real between = squares - sum * further;
  return {lanes.count * count, centre + further,
          m2 + lanes.count * (between < Real(0) ? Real(0) : between)};
}

template <typename Real, int kLanes>
__device__ __forceinline__ Sums<Real> of_lanes(const SumsOf<Real, kLanes>& lanes, int split,
                                               bool second) {
  Sums<Real> sums{};
#pragma unroll
  for (int k = 0; k < kLanes; ++k) {
    const bool counts = (k < split) != second;
    sums.g += counts ? lanes.g[k] : Real(0);
    sums.gx += counts ? lanes.gx[k] : Real(0);
  }
  return sums;
}

// As block_merge(), of a bundle. `records` has kBundleRecords places, and as many more as
// block_merge() needs.
template <typename Slot, typename Values>
__device__ __forceinline__ typename Values::Total bundle_merge(
    const Values& lanes, const Walk<Layout::kBundles, Slot>& walk, const Plan& plan,
    typename Values::Record* records) {
  constexpr int kLanes = Slot::kLanes;
  constexpr int kLeft = kMostGroups;  // records of a channel that its warp leaves for one thread
  const int thread = static_cast<int>(threadIdx.x);
  const int split = walk.owned().split;
  records[2 * thread] = of_lanes(lanes, split, false);
  records[2 * thread + 1] = of_lanes(lanes, split, true);
  __syncthreads();

  typename Values::Record* const left = records + kBundleRecords;
  const int columns = plan.columns;
  for (int c = thread / kWarp; c < kLanes; c += plan.threads / kWarp) {
    const int first = c * columns / kLanes;
    const int width = ((c + 1) * columns - 1) / kLanes - first + 1;
    const float per_width = 1.0f / static_cast<float>(width);
    // The first of its columns may begin in the channel before.
    const int second = first * kLanes < c * columns ? 1 : 0;
    typename Values::Records part;
    for (int i = thread % kWarp; i < width * walk.pass(); i += kWarp) {
      const int row = static_cast<int>((static_cast<float>(i) + 0.5f) * per_width);
      const int column = i - row * width;
      part.add(records[2 * (row * columns + first + column) + (column == 0 ? second : 0)]);
    }
    auto merged = part.all();
    for (int distance = kWarp / 2; distance >= kLeft; distance /= 2)
      merged.merge(merged.from_lane_below(distance));
    if (thread % kWarp < kLeft) left[c * kLeft + thread % kWarp] = merged.get(0);
  }
  __syncthreads();

  typename Values::Total total{};
  if (thread < kLanes) total = total_of(left + thread * kLeft, 1, kLeft);
  return total;
}

// Places that the reduction of a slab over a block needs, over all blocks of its team too.
template <typename Slot, Layout kLayout>
constexpr int kRecords = kMaxThreads / kWarp * kMostSlabChannels<Slot, kLayout> +
                         (kLayout == Layout::kBundles ? kBundleRecords : 0);

// Returns, in the thread of the slab's channel, what the block's threads together hold of it. See
// block_merge().
template <Layout kLayout, typename Slot, typename Values>
__device__ __forceinline__ typename Values::Total slab_merge(const Values& values,
                                                             const Walk<kLayout, Slot>& walk,
                                                             const Plan& plan,
                                                             typename Values::Record* records) {
  if constexpr (kLayout == Layout::kBundles) return bundle_merge(values, walk, plan, records);
  return block_merge(values, walk.channels() / Values::kSize, plan.threads, records);
}

}  // namespace brn
