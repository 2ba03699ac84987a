// Training-mode forward pass in one launch:
//
//   for each slab of its team, a block
//     - reads its share of x once, into registers, and takes their moments around the pivot; where
//       that is more than the registers hold, round after round, of which plan.retained before the
//       last one go on to shared memory
//     - meets the other blocks of the team, if any, and merges all their moments in rank order;
//       with plan.prefetch its share of the next slab is on its way to shared memory meanwhile
//     - computes r and d; the first block of the team moves the running statistics
//     - normalises what its registers and its shared memory still hold and writes y
//
// 1 read + 1 write of x is the floor, and it is met as long as a slab fits the registers and the
// shared memory of a team (plan.rounds == 1 + plan.retained). Otherwise the other rounds are read
// again, newest first, so that L2 still has as much of them as it can hold.
#include "affine_rows.cuh"
#include "barrier.cuh"
#include "launch.cuh"
#include "launch.h"
#include "moments.cuh"
#include "pivot.cuh"
#include "prefetch.cuh"
#include "retain.cuh"
#include "slab.cuh"
#include "step.cuh"
#include "tile.cuh"
#include "vector.cuh"

#include <cuda_runtime.h>

namespace brn {
namespace {

// What a channel brings to Algorithm 1. Read before the team meets: the first block moves the
// running statistics after that, and a block that came late would see the moved ones.
template <typename Real>
struct ChannelState {
  Real weight;
  Real bias;
  Running<Real> running;
};

template <typename Real>
__device__ __forceinline__ ChannelState<Real> channel_state(const ForwardParams& params, int c) {
  return {load_channel(params.weight, c, Real(1)),
          load_channel(params.bias, c, Real(0)),
          {load_channel(params.running_mean, c, Real(0)),
           load_channel(params.running_std, c, Real(1))}};
}

// With skip_nonfinite the averages wait as a proposal until the whole batch is known to be finite.
template <typename Real>
__device__ __forceinline__ void move_running(const ForwardParams& params, const Problem& p,
                                             const Workspace& workspace, int c,
                                             const PivotedMoments<Real>& all,
                                             const Running<Real>& running, Real momentum) {
  if (params.running_mean) {
    const Running<Real> next =
        moved(running, all.moments, all.pivot, static_cast<Real>(params.epsilon), momentum);
    Real* mean =
        static_cast<Real*>(params.skip_nonfinite ? workspace.proposals : params.running_mean);
    Real* std = params.skip_nonfinite ? mean + p.channels : static_cast<Real*>(params.running_std);
    mean[c] = next.mean;
    std[c] = next.std;
  }
  if (params.skip_nonfinite && !(isfinite(all.moments.mean) && isfinite(all.moments.m2)))
    atomicOr(nonfinite_word(workspace), 1u);
}

// skip_nonfinite: the last block of the grid takes over the proposals and counts the step, if every
// channel was finite.
template <typename Real>
__device__ __forceinline__ void commit_if_finite(const ForwardParams& params, const Problem& p,
                                                 const Plan& plan, const Workspace& workspace) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) last = is_last(take_ticket<Ticket::kHasWritten>(workspace));
  __syncthreads();
  if (!last) return;
  const bool finite = __ldcg(nonfinite_word(workspace)) == 0;
  __syncthreads();
  if (threadIdx.x == 0) *nonfinite_word(workspace) = 0;
  if (!finite) return;
  if (threadIdx.x == 0 && params.num_batches_tracked) *params.num_batches_tracked += 1;
  if (!params.running_mean) return;
  const Real* proposed = static_cast<const Real*>(workspace.proposals);
  for (std::int64_t c = threadIdx.x; c < p.channels; c += plan.threads) {
    static_cast<Real*>(params.running_mean)[c] = __ldcg(proposed + c);
    static_cast<Real*>(params.running_std)[c] = __ldcg(proposed + p.channels + c);
  }
}

// The planner counts on blocks_per_sm(). Slots of two bytes leave registers for a block more, which
// they need: 16 of them a thread are 8 KB in flight a block, where an SM takes about 26 at a time.
template <typename T, Layout kLayout, int kSlotBytes>
constexpr int kBlocks = kSlotBytes == 2 ? 4 : blocks_per_sm(kLayout, sizeof(T));

template <typename T, Layout kLayout, int kSlotBytes>
__global__ void __launch_bounds__(kMaxThreads, (kBlocks<T, kLayout, kSlotBytes>))
    forward_kernel(Problem p, Plan plan, Stride stride, ForwardParams params, Workspace workspace) {
  using Slot = brn::Slot<T, kSlotBytes>;
  using Real = RealOf<T>;
  constexpr int kSlots = slots_per_thread(Pass::kForward, kSlotBytes);
  constexpr int kChannels = kThreadChannels<Slot, kLayout>;
  constexpr int kSlab = kMostSlabChannels<Slot, kLayout>;
  using Next = Prefetch<Slot, kSlots, 1>;
  using Kept = Retained<Slot, kSlots, 1>;
  __shared__ Moments<Real> records[kMaxThreads / kWarp * kSlab];
  __shared__ ChannelState<Real> states[kSlab];
  __shared__ Real pivots[kSlab];
  __shared__ AffineRows<Real, kSlab> affines;
  __shared__ Step<Real> step;

  const Walk<kLayout, Slot::kLanes> walk(plan, stride);
  const int thread = static_cast<int>(threadIdx.x);
  const int channels = plan.columns * kChannels;
  const bool counts = params.num_batches_tracked && !params.skip_nonfinite;
  unsigned ticket = 0;  // of its first thread; compared in the end, since that waits for it
  // Not behind the first tile's loads: there its divisions in double cost up to 80 bytes of spills
  // (ptxas, sm_90).
  if (thread == 0) step = step_of<Real>(params);

  int parity = 0;
  for (int slab = walk.team(); slab < plan.slabs; slab += plan.teams, parity ^= 1) {
    const int channel0 = slab * channels;
    const int mine = walk.column() * kChannels;  // first of this thread's channels in the slab
    const bool in_range = walk.in_range(p, channel0);
    const bool finishes = thread < channels &&
                          channel0 + thread < p.channels;  // a channel, once its moments are known
    const std::int64_t slab_offset = walk.slab_offset(p, channel0);
    const T* x = static_cast<const T*>(params.x) + slab_offset;
    T* y = static_cast<T*>(params.y) + slab_offset;

    Real pivot[kPivotLoads<kLayout>][kChannels];
    load_pivots<Slot, kLayout>(x + (in_range ? mine : 0), p, plan, pivot);

    // Waited for together with the tile: before a wait for copies, behind the loads otherwise.
    const bool fetched = kPrefetches<Slot> && plan.prefetch && slab != walk.team();
    const auto read_state = [&] {
      if (finishes) states[thread] = channel_state<Real>(params, channel0 + thread);
    };
    if (fetched) read_state();

    typename Slot::Bits tile[kSlots];
    MomentsOf<Real, kChannels> moments = MomentsOf<Real, kChannels>::empty();
    for (int round = 0, piece = walk.piece(0); round < plan.rounds; piece = round++) {
      const int left = in_range ? walk.left(piece) : 0;
      Cursor cursor = walk.begin(p, piece);
      const bool retained = plan.retains(round);
      if (round + 1 < plan.rounds && !retained) {
        load_tile<Slot, Reuse::kAgain>(tile, x, left, cursor, walk);
      } else if (fetched) {
        Next::take(left, walk, tile);
      } else {
        load_tile<Slot, Reuse::kOnce>(tile, x, left, cursor, walk);
      }
      if (round == 0) {
        settle_pivots<kLayout>(plan, pivot, pivots);
        if (!fetched) read_state();
      }
      if (retained) Kept::keep(plan.retained_place(round), tile);
      moments.merge(tile_moments<Slot, kLayout>(tile, left, walk, pivot[0]));
    }

    ExactMoments<Real> total = block_merge(moments, plan.columns, plan.threads, records);
    // The block has read the counter. Behind the arrival at the team's barrier, whose release would
    // wait for an atomic before it.
    const auto ask_once = [&] {
      if (counts && slab == walk.team() && thread == 0)
        ticket = take_ticket<Ticket::kHasRead>(workspace);
    };
    if (plan.team == 1) {
      ask_once();
    } else {
      const auto fetch_next = [&] {
        ask_once();
        const T* tensor = static_cast<const T*>(params.x);
        if (plan.prefetch) Next::fetch(p, plan, slab + plan.teams, walk, tensor);
      };
      total = team_moments<Slot, kLayout>(total.moments, plan, stride.positions,
                                          Slot::kLanes / kChannels, channels, walk.team(),
                                          walk.rank(), parity, workspace, records, fetch_next);
    }
    if (finishes) {
      const ChannelState<Real> state = states[thread];
      PivotedMoments<Real> all = around_mean(total, pivots[thread]);
      all.moments.count = static_cast<Real>(p.reduced());
      const ChannelStats<Real> stats = channel_stats(
          all.moments, all.pivot, static_cast<Real>(params.epsilon), state.running, step.limits);
      affines.write(thread, training_affine(stats, state.weight, state.bias));
      if (walk.rank() == 0) {
        write_stats(params, p.channels, channel0 + thread, stats);
        move_running(params, p, workspace, channel0 + thread, all, state.running, step.momentum);
      }
    }
    __syncthreads();

    Affine<Real> affine[kChannels];
    affines.read(mine, affine);
    for (int round = plan.rounds - 1; round >= 0; --round) {
      const int piece = walk.piece(round);
      const int left = in_range ? walk.left(piece) : 0;
      Cursor cursor = walk.begin(p, piece);
      forget_the_way(cursor);
      if (plan.retains(round)) {
        Kept::take(plan.retained_place(round), tile);
      } else if (round + 1 < plan.rounds) {
        Cursor again = cursor;
        load_tile<Slot, Reuse::kOnce>(tile, x, left, again, walk);
      }
#pragma unroll
      for (int v = 0; v < kSlots; ++v) {
        if (walk.has(v, left)) {
          keep_packed(tile[v]);
          Real value[Slot::kLanes];
          Slot::unpack(tile[v], value);
#pragma unroll
          for (int i = 0; i < Slot::kLanes; ++i)
            value[i] = apply(affine[channel_of<kLayout>(i)], value[i]);
          Slot::store(y + cursor.offset, value);
        }
        walk.advance(cursor);
      }
    }
  }

  if (counts && thread == 0 && is_last(ticket))
    *params.num_batches_tracked = step_count(params) + 1;
  if (params.skip_nonfinite) commit_if_finite<Real>(params, p, plan, workspace);
}

}  // namespace

int launch_forward(const Problem& p, const Plan& plan, const ForwardParams& params,
                   const Workspace& workspace, cudaStream_t stream) {
  return dispatch(p, plan, [&](auto variant) {
    using V = decltype(variant);
    static Allowed allowed;
    return launch_meeting(allowed, dynamic_shared_bytes(plan, Pass::kForward),
                          forward_kernel<typename V::T, V::kLayout, V::kSlotBytes>, plan, stream, p,
                          plan, stride(p, plan), params, workspace);
  });
}

}  // namespace brn
