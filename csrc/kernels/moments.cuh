// The moments of a slab: of the tile in a thread's registers, and of all that the team holds.
#pragma once

#include "barrier.cuh"
#include "bundle.cuh"
#include "launch.h"
#include "reduce.cuh"
#include "tile.cuh"
#include "unaligned.cuh"
#include "vector.cuh"

#include <cuda_runtime.h>

namespace brn {

// Values that a thread's sums are taken around: the mean of its first slot. Equal values give
// exactly themselves, because they are added pairwise.
template <typename Slot, Layout kLayout, typename Real, int kChannels>
__device__ __forceinline__ void slot_means(const typename Slot::Bits& first,
                                           Real (&centre)[kChannels]) {
  Real x[Slot::kLanes];
  Slot::unpack(first, x);
#pragma unroll
  for (int width = Slot::kLanes / 2; width >= kChannels; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  }
#pragma unroll
  for (int k = 0; k < kChannels; ++k) centre[k] = x[k] * (Real(kChannels) / Real(Slot::kLanes));
}

// Moments of a tile about its own centre, in one pass: sums of delta = x - centre and of its
// square, with m2 = sum(delta^2) - sum(delta)^2 / count. Unlike in E[x^2] - E[x]^2 that difference
// cannot cancel: the centre is the mean of one of the tile's slots, so sum(delta)^2 / count, which
// is count * (centre - mean)^2, is at most (slots of the tile) * m2: 8 m2, 16 with narrow slots. A
// second pass over the registers would be worse: the compiler keeps the first one's deltas for it,
// 200 bytes of spills (ptxas, sm_90).
//
// A slot that does not exist adds nothing. Where each of its elements has a channel of its own it
// is taken to be the first one again, whose deltas are 0; that is a select a register, where
// selecting the sums takes two a channel.
template <typename Slot, Layout kLayout, int kSlots, typename Real, int kChannels>
__device__ __forceinline__ MomentsOf<Real, kChannels> tile_moments(
    typename Slot::Bits (&tile)[kSlots], int slots, const Real (&pivot)[kChannels]) {
  constexpr bool kFirstAgain = Slot::kLanes == kChannels;
  Real centre[kChannels];
  slot_means<Slot, kLayout>(tile[0], centre);

  MomentsOf<Real, kChannels> moments = MomentsOf<Real, kChannels>::empty();
#pragma unroll
  for (int v = 0; v < kSlots; ++v) {
    const bool exists = v < slots;
    keep_packed(tile[v]);
    Real x[Slot::kLanes];
    Slot::unpack(kFirstAgain ? chosen(exists, tile[v], tile[0]) : tile[v], x);
    if constexpr (kFirstAgain) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        const Real delta = x[k] - centre[k];
        moments.mean[k] += delta;
        moments.m2[k] += delta * delta;
      }
    } else {
      Real sum = Real(0);
      Real squares = Real(0);
#pragma unroll
      for (int i = 0; i < Slot::kLanes; ++i) {
        const Real delta = x[i] - centre[0];
        sum += delta;
        squares += delta * delta;
      }
      moments.mean[0] += exists ? sum : Real(0);
      moments.m2[0] += exists ? squares : Real(0);
    }
  }

  const int count = (slots < kSlots ? slots : kSlots) * (Slot::kLanes / kChannels);
  moments.count = static_cast<Real>(count);
  const Real share = count > 0 ? Real(1) / moments.count : Real(0);
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    const Real mean = moments.mean[k] * share;
    const Real m2 = moments.m2[k] - moments.mean[k] * mean;
    moments.m2[k] = m2 < Real(0) ? Real(0) : m2;  // NaN stays
    moments.mean[k] = count > 0 ? (centre[k] - pivot[k]) + mean : Real(0);
  }
  return moments;
}

// The moments of the slots that a piece has, from the cursor on.
template <typename Slot, Layout kLayout, int kSlots, typename Real, int kChannels>
__device__ __forceinline__ MomentsOf<Real, kChannels> piece_moments(
    typename Slot::Bits (&tile)[kSlots], int slots, const Cursor& cursor,
    const Walk<kLayout, Slot>& walk, const Cover<Slot, kLayout>& cover,
    const Real (&pivot)[kChannels]) {
  if constexpr (kLayout == Layout::kUnaligned) {
    return unaligned_moments<Slot>(tile, CoveredLanes<Slot>(slots, cursor, walk, cover), pivot[0]);
  } else {
    return tile_moments<Slot, kLayout>(tile, slots, pivot);
  }
}

// What the whole team holds of slab channel c, in thread c. Every block computes it, from the same
// records in the same order, about the mean of the first. While it waits for them it does
// `meanwhile`.
template <typename Slot, Layout kLayout, typename Real, typename Meanwhile>
__device__ __forceinline__ ExactMoments<Real> team_moments(
    Moments<Real> mine, const Problem& p, const Plan& plan, const Stride& stride, int channel0,
    const Walk<kLayout, Slot>& walk, int parity, const Workspace& workspace, Moments<Real>* records,
    Meanwhile meanwhile) {
  const int channels = walk.channels();
  const Partials<Real> partials(workspace, plan, channels, walk.team(), parity);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < channels) partials.publish(walk.rank(), thread, mine.mean, mine.m2);
  team_barrier(barrier_line(workspace, walk.team()), plan.team, walk.rank(), meanwhile);

  const Real first = partials.first();
  // Elements of a channel that the last rank owns, and that each of the others does. In kUnaligned
  // they differ from rank to rank.
  const Real each = static_cast<Real>(plan.share * stride.values);
  const Real last =
      static_cast<Real>((stride.positions - (plan.team - 1) * plan.share) * stride.values);
  RecordSums<Real> sums;
  partials.template for_each<records_ahead(kLayout, Slot::kBytes)>(
      plan, [&](int r, Real mean, Real m2) {
        Real count = r + 1 < plan.team ? each : last;
        if constexpr (kLayout == Layout::kUnaligned) {
          count = static_cast<Real>(walk.values_before(p, channel0, r + 1) -
                                    walk.values_before(p, channel0, r));
        }
        sums.add(count, mean - first, m2);
      });
  ExactMoments<Real> total = block_merge(sums.all(), channels, plan.threads, records);
  const TwoSum<Real> mean = two_sum(first, total.moments.mean);
  total.moments.mean = mean.sum;
  total.residue += mean.error;
  return total;
}

}  // namespace brn
