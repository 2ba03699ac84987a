// The reductions of the backward pass over a slab: of the tiles in a thread's registers, and of all
// that the team holds.
#pragma once

#include "barrier.cuh"
#include "bundle.cuh"
#include "launch.h"
#include "reduce.cuh"
#include "tile.cuh"
#include "unaligned.cuh"
#include "vector.cuh"

#include <cuda_runtime.h>

#include <cstdint>

namespace brn {

template <typename Real>
__device__ __forceinline__ Real centre_of(const void* stats, int c) {
  return static_cast<const Real*>(stats)[c];
}

template <typename Slot, Layout kLayout, int kSlots, typename Real, int kChannels>
__device__ __forceinline__ SumsOf<Real, kChannels> tile_sums(typename Slot::Bits (&x_tile)[kSlots],
                                                             typename Slot::Bits (&dy_tile)[kSlots],
                                                             const Real (&centre)[kChannels]) {
  SumsOf<Real, kChannels> sums = SumsOf<Real, kChannels>::empty();
#pragma unroll
  for (int v = 0; v < kSlots; ++v) {  // a slot that does not exist holds dy = 0 and adds nothing
    keep_packed(x_tile[v]);
    keep_packed(dy_tile[v]);
    Real x[Slot::kLanes];
    Real dy[Slot::kLanes];
    Slot::unpack(x_tile[v], x);
    Slot::unpack(dy_tile[v], dy);
    SumsOf<Real, kChannels> slot = SumsOf<Real, kChannels>::empty();
#pragma unroll
    for (int i = 0; i < Slot::kLanes; ++i) {
      const int k = channel_of<kLayout>(i);
      slot.g[k] += dy[i];
      slot.gx[k] += dy[i] * (x[i] - centre[k]);
    }
    sums.merge(slot);
  }
  return sums;
}

// The sums of the slots that a piece has, from the cursor on.
template <typename Slot, Layout kLayout, int kSlots, typename Real, int kChannels>
__device__ __forceinline__ SumsOf<Real, kChannels> piece_sums(
    typename Slot::Bits (&x_tile)[kSlots], typename Slot::Bits (&dy_tile)[kSlots], int slots,
    const Cursor& cursor, const Walk<kLayout, Slot>& walk, const Cover<Slot, kLayout>& cover,
    const Real (&centre)[kChannels]) {
  if constexpr (kLayout == Layout::kUnaligned) {
    return unaligned_sums<Slot>(x_tile, dy_tile, CoveredLanes<Slot>(slots, cursor, walk, cover),
                                centre[0]);
  } else {
    return tile_sums<Slot, kLayout>(x_tile, dy_tile, centre);
  }
}

// What the whole team holds of slab channel c, in thread c, from the sums of each thread. Every
// block computes it, from the same records in the same order. While it waits for them it does
// `meanwhile`.
template <typename Slot, Layout kLayout, typename Real, int kChannels, typename Walk,
          typename Meanwhile>
__device__ __forceinline__ Sums<Real> slab_sums(const SumsOf<Real, kChannels>& sums,
                                                const Plan& plan, int channels, const Walk& walk,
                                                int parity, const Workspace& workspace,
                                                Sums<Real>* records, Meanwhile meanwhile) {
  const Sums<Real> mine = slab_merge(sums, walk, plan, records);
  if (plan.team == 1) return mine;
  const Partials<Real> partials(workspace, plan, channels, walk.team(), parity);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < channels) partials.publish(walk.rank(), thread, mine.g, mine.gx);
  team_barrier(barrier_line(workspace, walk.team()), plan.team, walk.rank(), meanwhile);

  SumsOf<Real, 1> part = SumsOf<Real, 1>::empty();
  const auto merge = [&](int, Real g, Real gx) {
    SumsOf<Real, 1> other;
    other.g[0] = g;
    other.gx[0] = gx;
    part.merge(other);
  };
  partials.template for_each<records_ahead(kLayout, Slot::kBytes)>(plan, merge);
  return block_merge(part, channels, plan.threads, records);
}

}  // namespace brn
