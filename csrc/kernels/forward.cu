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

template <typename Real>
__device__ __forceinline__ void expect_state(const ForwardParams& params, int c) {
  expect_channel<Real>(params.weight, c);
  expect_channel<Real>(params.bias, c);
  expect_channel<Real>(params.running_mean, c);
  expect_channel<Real>(params.running_std, c);
}

// With skip_nonfinite the averages wait as a proposal until the whole batch is known to be finite.
template <typename Real>
__device__ __forceinline__ void move_running(const ForwardParams& params, const Problem& p,
                                             const Workspace& workspace, int c,
                                             const PivotedMoments<Real>& all,
                                             const Running<Real>& running, const Step<Real>& step) {
  if (params.running_mean) {
    const Running<Real> next = moved(running, all.moments, all.pivot, step.epsilon, step.momentum);
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
constexpr int kBlocks = blocks_per_sm(kLayout, sizeof(T)) + (kSlotBytes == 2 ? 1 : 0);

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
  __shared__ Moments<Real> records[kRecords<Slot, kLayout>];
  __shared__ ChannelState<Real> states[kSlab];
  __shared__ Real pivots[kSlab];
  __shared__ AffineRows<Real, kSlab> affines;
  __shared__ Step<Real> step;

  const Walk<kLayout, Slot> walk(plan, stride);
  const int thread = static_cast<int>(threadIdx.x);
  const int channels = walk.channels();
  const int own = kSlab == 1 ? 0 : thread;  // the slab's channel that it finishes, if any
  const T* const x = static_cast<const T*>(params.x);
  T* const y = static_cast<T*>(params.y);
  const bool counts = params.num_batches_tracked && !params.skip_nonfinite;
  if (thread == plan.threads - 1) step = fixed_step<Real>(params, p.reduced());

  int parity = 0;
  for (int slab = walk.team(); slab < plan.slabs; slab += plan.teams, parity ^= 1) {
    const int channel0 = slab * channels;
    const int there = walk.channels(p, channel0);
    const Cover<Slot, kLayout> cover = walk.cover(p, channel0);
    const bool finishes = thread < there;  // a channel, once its moments are known

    Pivots<Slot, kLayout> coming;
    coming.load(x + walk.first_element(p, channel0), p, plan);

    // Waited for together with the tile: before a wait for copies, behind the loads otherwise.
    const bool fetched = kPrefetches<Slot> && plan.prefetch && slab >= plan.teams;
    const auto read_state = [&] {
      int c = channel0 + own;
      compute_here(c);
      if (finishes) states[own] = channel_state<Real>(params, c);
    };
    if (fetched) read_state();

    typename Slot::Bits tile[kSlots];
    Real pivot[kChannels] = {};  // from the first round on
    MomentsOf<Real, kChannels> moments = MomentsOf<Real, kChannels>::empty();
    for (int round = 0, piece = walk.piece(0); round < plan.rounds; piece = round++) {
      const int slots = walk.in_range(there) ? walk.slots(piece) : 0;
      Cursor cursor = walk.begin(p, channel0, piece);
      const bool retained = plan.retains(round);
      if (round + 1 < plan.rounds && !retained) {
        load_tile<Slot, Reuse::kAgain>(tile, x, slots, cursor, walk, cover);
      } else if (fetched) {
        Next::take(slots, tile);
      } else {
        load_tile<Slot, Reuse::kOnce>(tile, x, slots, cursor, walk, cover);
      }
      if (round == 0) {
        // Beside the tile's way from memory. By the last thread: the first ones wait for states.
        int last = plan.threads - 1;
        compute_here(last);
        if (slab < plan.teams && thread == last && step.follows_counter)
          follow_counter(params, step);
        coming.settle(walk, plan, pivot, pivots);
        if (!fetched) read_state();
      }
      if (retained) Kept::keep(plan.retained_place(round), tile);
      const MomentsOf<Real, kChannels> more =
          piece_moments<Slot, kLayout>(tile, slots, cursor, walk, cover, pivot);
      if (round == 0) {
        moments = more;
      } else {
        moments.merge(more);
      }
    }

    ExactMoments<Real> total = slab_merge(moments, walk, plan, records);
    // The block has read the counter. Behind the arrival at the team's barrier, whose release would
    // wait for an atomic before it.
    const bool asks = counts && thread == 0 && slab + plan.teams >= plan.slabs;
    unsigned ticket = 0;  // compared in the end, since that waits for it
    const auto ask_once = [&] {
      if (asks) ticket = take_ticket<Ticket::kHasRead>(workspace);
    };
    if (plan.team == 1) {
      ask_once();
    } else {
      const auto fetch_next = [&] {
        ask_once();
        if (!kPrefetches<Slot> || !plan.prefetch || slab + plan.teams >= plan.slabs) return;
        const int next0 = (slab + plan.teams) * channels;
        Next::fetch(p, next0, walk, x);
        Pivots<Slot, kLayout>::expect(x + walk.first_element(p, next0), p, plan);
        if (thread < walk.channels(p, next0)) expect_state<Real>(params, next0 + own);
      };
      total = team_moments<Slot, kLayout>(total.moments, p, plan, stride, channel0, walk, parity,
                                          workspace, records, fetch_next);
    }
    if (finishes) {
      int c = channel0 + own;
      compute_here(c);
      const ChannelState<Real> state = states[own];
      PivotedMoments<Real> all = around_mean(total, pivots[own]);
      all.moments.count = step.values;
      const ChannelStats<Real> stats =
          channel_stats(all.moments, all.pivot, step.epsilon, state.running, step.limits);
      affines.write(own, training_affine(stats, state.weight, state.bias));
      if (walk.rank() == 0) {
        write_stats(params, p.channels, c, stats);
        move_running(params, p, workspace, c, all, state.running, step);
      }
    }
    __syncthreads();

    Affine<Real> affine[kChannels];
    affines.read(walk.owned(), affine);
    for (int round = plan.rounds - 1; round >= 0; --round) {
      const int piece = walk.piece(round);
      const int slots = walk.in_range(there) ? walk.slots(piece) : 0;
      Cursor cursor = walk.begin(p, channel0, piece);
      forget_the_way(cursor);
      if (plan.retains(round)) {
        Kept::take(plan.retained_place(round), tile);
      } else if (round + 1 < plan.rounds) {
        load_tile<Slot, Reuse::kOnce>(tile, x, slots, cursor, walk, cover);
      }
      char* to = at(y, cursor);
#pragma unroll
      for (int v = 0; v < kSlots; ++v) {
        keep_packed(tile[v]);
        Real value[Slot::kLanes];
        Slot::unpack(tile[v], value);
#pragma unroll
        for (int i = 0; i < Slot::kLanes; ++i)
          value[i] = apply(affine[channel_of<kLayout>(i)], value[i]);
        if (v < slots) store_slot<Slot>(to, value, cursor.plane_left, cover);
        to += walk.advance(cursor.plane_left);
      }
    }
    if (asks && is_last(ticket)) *params.num_batches_tracked = step_count(params) + 1;
  }

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
