// One rank's message of a step that several take together, in one launch: the first half of
// forward.cu. 1 read of x is the floor, and it is met.
#include "../core/ranks.h"
#include "launch.cuh"
#include "launch.h"
#include "moments.cuh"
#include "pivot.cuh"
#include "prefetch.cuh"
#include "slab.cuh"
#include "tile.cuh"
#include "vector.cuh"

#include <cuda_runtime.h>

namespace brn {
namespace {

template <typename T, Layout kLayout, int kSlotBytes>
__global__ void __launch_bounds__(kMaxThreads, blocks_per_sm(kLayout, sizeof(T)))
    moments_kernel(Problem p, Plan plan, Stride stride, MomentsParams params, Workspace workspace) {
  using Slot = brn::Slot<T, kSlotBytes>;
  using Real = RealOf<T>;
  constexpr int kSlots = slots_per_thread(Pass::kForward, kSlotBytes);
  constexpr int kChannels = kThreadChannels<Slot, kLayout>;
  constexpr int kSlab = kMostSlabChannels<Slot, kLayout>;
  using Next = Prefetch<Slot, kSlots, 1>;
  __shared__ Moments<Real> records[kRecords<Slot, kLayout>];
  __shared__ Real pivots[kSlab];

  const Walk<kLayout, Slot> walk(plan, stride);
  const int thread = static_cast<int>(threadIdx.x);
  const int channels = walk.channels();
  const T* const x = static_cast<const T*>(params.x);

  int parity = 0;
  for (int slab = walk.team(); slab < plan.slabs; slab += plan.teams, parity ^= 1) {
    const int channel0 = slab * channels;
    const int there = walk.channels(p, channel0);
    const Cover<Slot, kLayout> cover = walk.cover(p, channel0);

    Pivots<Slot, kLayout> coming;
    coming.load(x + walk.first_element(p, channel0), p, plan);

    typename Slot::Bits tile[kSlots];
    Real pivot[kChannels] = {};  // from the first round on
    MomentsOf<Real, kChannels> moments = MomentsOf<Real, kChannels>::empty();
    for (int round = 0, piece = walk.piece(0); round < plan.rounds; piece = round++) {
      const int slots = walk.in_range(there) ? walk.slots(piece) : 0;
      Cursor cursor = walk.begin(p, channel0, piece);
      if (kPrefetches<Slot> && plan.prefetch && slab >= plan.teams) {
        Next::take(slots, tile);
      } else {
        load_tile<Slot, Reuse::kOnce>(tile, x, slots, cursor, walk, cover);
      }
      if (round == 0) coming.settle(walk, plan, pivot, pivots);
      const MomentsOf<Real, kChannels> more =
          piece_moments<Slot, kLayout>(tile, slots, cursor, walk, cover, pivot);
      if (round == 0) {
        moments = more;
      } else {
        moments.merge(more);
      }
    }

    ExactMoments<Real> total = slab_merge(moments, walk, plan, records);
    if (plan.team > 1) {
      const auto fetch_next = [&] {
        if (!kPrefetches<Slot> || !plan.prefetch || slab + plan.teams >= plan.slabs) return;
        const int next0 = (slab + plan.teams) * channels;
        Next::fetch(p, next0, walk, x);
        Pivots<Slot, kLayout>::expect(x + walk.first_element(p, next0), p, plan);
      };
      total = team_moments<Slot, kLayout>(total.moments, p, plan, stride, channel0, walk, parity,
                                          workspace, records, fetch_next);
    }
    if (walk.rank() == 0 && thread < there) {
      double* mean = params.message + channel0 + thread;
      mean[0] = static_cast<double>(pivots[thread]) + static_cast<double>(total.moments.mean) +
                static_cast<double>(total.residue);
      mean[p.channels] = static_cast<double>(total.moments.m2);
    }
    __syncthreads();  // before the next slab's records
  }
  if (blockIdx.x == 0 && thread == 0) {
    params.message[2 * p.channels] = static_cast<double>(p.reduced());
    params.message[2 * p.channels + 1] = params.backward ? 1.0 : 0.0;
  }
}

}  // namespace

int launch_moments(const Problem& p, const Plan& plan, const MomentsParams& params,
                   const Workspace& workspace, cudaStream_t stream) {
  return dispatch(p, plan, [&](auto variant) {
    using V = decltype(variant);
    static Allowed allowed;
    return launch_meeting(allowed, plan.prefetch * kPrefetchBytes,
                          moments_kernel<typename V::T, V::kLayout, V::kSlotBytes>, plan, stream, p,
                          plan, stride(p, plan), params, workspace);
  });
}

}  // namespace brn
