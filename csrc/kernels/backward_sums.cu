// One rank's reductions of the backward pass of a step that several take together, and its dweight
// and dbias, in one launch: the first half of backward.cu. 1 read of x and of dy is the floor, and
// it is met.
#include "launch.cuh"
#include "launch.h"
#include "prefetch.cuh"
#include "slab.cuh"
#include "sums.cuh"
#include "tile.cuh"
#include "vector.cuh"

#include <cuda_runtime.h>

namespace brn {
namespace {

template <typename T, Layout kLayout, int kSlotBytes>
__global__ void __launch_bounds__(kMaxThreads, blocks_per_sm(kLayout, sizeof(T)))
    backward_sums_kernel(Problem p, Plan plan, Stride stride, BackwardSumsParams params,
                         Workspace workspace) {
  using Slot = brn::Slot<T, kSlotBytes>;
  using Real = RealOf<T>;
  constexpr int kSlots = slots_per_thread(Pass::kBackward, kSlotBytes);
  constexpr int kChannels = kThreadChannels<Slot, kLayout>;
  using Next = Prefetch<Slot, kSlots, 2>;
  __shared__ Sums<Real> records[kRecords<Slot, kLayout>];

  const Walk<kLayout, Slot> walk(plan, stride);
  const int thread = static_cast<int>(threadIdx.x);
  const int channels = walk.channels();
  const T* const x = static_cast<const T*>(params.x);
  const T* const dy = static_cast<const T*>(params.dy);

  int parity = 0;
  for (int slab = walk.team(); slab < plan.slabs; slab += plan.teams, parity ^= 1) {
    const int channel0 = slab * channels;
    const int there = walk.channels(p, channel0);
    const Cover<Slot, kLayout> cover = walk.cover(p, channel0);
    Real centre[kChannels];
    const Owned<kLayout> all = walk.owned(p, channel0);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) centre[k] = centre_of<Real>(params.stats, all[k]);

    typename Slot::Bits x_tile[kSlots];
    typename Slot::Bits dy_tile[kSlots];
    SumsOf<Real, kChannels> sums = SumsOf<Real, kChannels>::empty();
    for (int round = 0, piece = walk.piece(0); round < plan.rounds; piece = round++) {
      const int slots = walk.in_range(there) ? walk.slots(piece) : 0;
      Cursor cursor = walk.begin(p, channel0, piece);
      if (kPrefetches<Slot> && plan.prefetch && slab >= plan.teams) {
        Next::take(slots, x_tile, dy_tile);
      } else {
        load_tiles<Slot, Reuse::kOnce>(x_tile, x, dy_tile, dy, slots, cursor, walk, cover);
      }
      sums.merge(piece_sums<Slot, kLayout>(x_tile, dy_tile, slots, cursor, walk, cover, centre));
    }

    const auto fetch_next = [&] {
      if (!kPrefetches<Slot> || !plan.prefetch || slab + plan.teams >= plan.slabs) return;
      const int next0 = (slab + plan.teams) * channels;
      Next::fetch(p, next0, walk, x, dy);
      if (thread < walk.channels(p, next0))
        expect_stats<Real>(params.stats, p.channels, next0 + thread);
    };
    Sums<Real> total = slab_sums<Slot, kLayout>(sums, plan, channels, walk, parity, workspace,
                                                records, fetch_next);
    const int c = channel0 + thread;
    if (walk.rank() == 0 && thread < there) {
      const ChannelStats<Real> stats = stats_of<Real>(params.stats, p.channels, c);
      total = around_mean(total, stats.residue);
      params.sums[c] = static_cast<double>(total.g);
      params.sums[p.channels + c] = static_cast<double>(total.gx);
      static_cast<Real*>(params.dweight)[c] = weight_gradient(total, stats);
      static_cast<Real*>(params.dbias)[c] = total.g;
    }
    __syncthreads();  // before the next slab's records
  }
}

}  // namespace

int launch_backward_sums(const Problem& p, const Plan& plan, const BackwardSumsParams& params,
                         const Workspace& workspace, cudaStream_t stream) {
  return dispatch(p, plan, [&](auto variant) {
    using V = decltype(variant);
    static Allowed allowed;
    return launch_meeting(allowed, plan.prefetch * kPrefetchBytes,
                          backward_sums_kernel<typename V::T, V::kLayout, V::kSlotBytes>, plan,
                          stream, p, plan, stride(p, plan), params, workspace);
  });
}

}  // namespace brn
