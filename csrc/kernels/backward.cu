// Backward pass in one launch:
//
//   for each slab of its team, a block
//     - reads its share of x and dy once, into registers, and takes sum(dy), sum(dy * (x - mean));
//       where that is more than the registers hold, round after round, of which plan.retained
//       before the last one go on to shared memory
//     - meets the other blocks of the team, if any, and adds all their sums in rank order; with
//       plan.prefetch its share of the next slab is on its way to shared memory meanwhile
//     - projects dy onto the null space of 1 and x_norm and writes dx
//   the first block of the team writes dweight and dbias
//
// 2 reads + 1 write is the floor, and it is met as long as a slab of both tensors fits the
// registers and the shared memory of a team (plan.rounds == 1 + plan.retained). Otherwise the other
// rounds are read again, newest first.
#include "launch.cuh"
#include "launch.h"
#include "prefetch.cuh"
#include "retain.cuh"
#include "slab.cuh"
#include "sums.cuh"
#include "tile.cuh"
#include "vector.cuh"

#include <cuda_runtime.h>

namespace brn {
namespace {

template <typename Real>
__device__ __forceinline__ ChannelStats<Real> stats_of(const BackwardParams& params,
                                                       const Problem& p, int c) {
  if (!params.stats) {
    return inference_stats<Real>({static_cast<const Real*>(params.running_mean)[c],
                                  static_cast<const Real*>(params.running_std)[c]});
  }
  return brn::stats_of<Real>(params.stats, p.channels, c);
}

template <typename Real>
__device__ __forceinline__ Real centre_of(const BackwardParams& params, int c) {
  if (!params.stats) return static_cast<const Real*>(params.running_mean)[c];
  return brn::centre_of<Real>(params.stats, c);
}

// What a channel brings to its projection.
template <typename Real>
struct ChannelState {
  ChannelStats<Real> stats;
  Real weight;
};

// Of what it asks for, centre_of() reads one row.
template <typename Real>
__device__ __forceinline__ void expect_state(const BackwardParams& params, const Problem& p,
                                             int c) {
  expect_channel<Real>(params.weight, c);
  expect_channel<Real>(params.stats ? nullptr : params.running_mean, c);
  expect_channel<Real>(params.stats ? nullptr : params.running_std, c);
  expect_stats<Real>(params.stats, p.channels, c);
}

template <typename T, Layout kLayout, int kSlotBytes>
__global__ void __launch_bounds__(kMaxThreads, blocks_per_sm(kLayout, sizeof(T)))
    backward_kernel(Problem p, Plan plan, Stride stride, BackwardParams params,
                    Workspace workspace) {
  using Slot = brn::Slot<T, kSlotBytes>;
  using Real = RealOf<T>;
  constexpr int kSlots = slots_per_thread(Pass::kBackward, kSlotBytes);
  constexpr int kChannels = kThreadChannels<Slot, kLayout>;
  constexpr int kSlab = kMostSlabChannels<Slot, kLayout>;
  using Next = Prefetch<Slot, kSlots, 2>;
  using Kept = Retained<Slot, kSlots, 2>;
  __shared__ Sums<Real> records[kRecords<Slot, kLayout>];
  __shared__ ChannelState<Real> states[kSlab];
  __shared__ Projection<Real> projections[kSlab];

  const Walk<kLayout, Slot> walk(plan, stride);
  const int thread = static_cast<int>(threadIdx.x);
  const int channels = walk.channels();
  const int own = kSlab == 1 ? 0 : thread;  // the slab's channel that it finishes, if any
  const T* const x = static_cast<const T*>(params.x);
  const T* const dy = static_cast<const T*>(params.dy);
  T* const dx = static_cast<T*>(params.dx);

  int parity = 0;
  for (int slab = walk.team(); slab < plan.slabs; slab += plan.teams, parity ^= 1) {
    const int channel0 = slab * channels;
    const int there = walk.channels(p, channel0);
    const Cover<Slot, kLayout> cover = walk.cover(p, channel0);
    const bool finishes = thread < there;  // a channel, once its sums are known
    Real centre[kChannels];
    const Owned<kLayout> all = walk.owned(p, channel0);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) centre[k] = centre_of<Real>(params, all[k]);

    // Waited for together with the tiles, not behind the team's barrier: before a wait for copies,
    // behind the loads otherwise.
    const bool fetched = kPrefetches<Slot> && plan.prefetch && slab >= plan.teams;
    const auto read_state = [&] {
      const int c = channel0 + own;
      if (finishes)
        states[own] = {stats_of<Real>(params, p, c), load_channel(params.weight, c, Real(1))};
    };
    if (fetched) read_state();

    typename Slot::Bits x_tile[kSlots];
    typename Slot::Bits dy_tile[kSlots];
    SumsOf<Real, kChannels> sums = SumsOf<Real, kChannels>::empty();
    for (int round = 0, piece = walk.piece(0); round < plan.rounds; piece = round++) {
      const int slots = walk.in_range(there) ? walk.slots(piece) : 0;
      Cursor cursor = walk.begin(p, channel0, piece);
      const bool retained = plan.retains(round);
      if (round + 1 < plan.rounds && !retained) {
        load_tiles<Slot, Reuse::kAgain>(x_tile, x, dy_tile, dy, slots, cursor, walk, cover);
      } else if (fetched) {
        Next::take(slots, x_tile, dy_tile);
      } else {
        load_tiles<Slot, Reuse::kOnce>(x_tile, x, dy_tile, dy, slots, cursor, walk, cover);
      }
      if (retained) Kept::keep(plan.retained_place(round), x_tile, dy_tile);
      if (round == 0 && !fetched) read_state();
      sums.merge(piece_sums<Slot, kLayout>(x_tile, dy_tile, slots, cursor, walk, cover, centre));
    }

    const auto fetch_next = [&] {
      if (!kPrefetches<Slot> || !plan.prefetch || slab + plan.teams >= plan.slabs) return;
      const int next0 = (slab + plan.teams) * channels;
      Next::fetch(p, next0, walk, x, dy);
      int c = next0 + own;
      compute_here(c);
      if (thread < walk.channels(p, next0)) expect_state<Real>(params, p, c);
    };
    Sums<Real> total = slab_sums<Slot, kLayout>(sums, plan, channels, walk, parity, workspace,
                                                records, fetch_next);
    if (finishes) {
      const int c = channel0 + own;
      const ChannelState<Real> state = states[own];
      total = around_mean(total, state.stats.residue);
      projections[own] = projection(total, static_cast<Real>(p.reduced()), state.stats,
                                    state.weight, params.stats != nullptr);
      if (walk.rank() == 0) {
        static_cast<Real*>(params.dweight)[c] = weight_gradient(total, state.stats);
        static_cast<Real*>(params.dbias)[c] = total.g;
      }
    }
    __syncthreads();

    Projection<Real> projected[kChannels];
    walk.owned().each(projected, [&](int c) { return projections[c]; });
    for (int round = plan.rounds - 1; round >= 0; --round) {
      const int piece = walk.piece(round);
      const int slots = walk.in_range(there) ? walk.slots(piece) : 0;
      Cursor cursor = walk.begin(p, channel0, piece);
      forget_the_way(cursor);
      if (plan.retains(round)) {
        Kept::take(plan.retained_place(round), x_tile, dy_tile);
      } else if (round + 1 < plan.rounds) {
        load_tiles<Slot, Reuse::kOnce>(x_tile, x, dy_tile, dy, slots, cursor, walk, cover);
      }
      char* to = at(dx, cursor);
#pragma unroll
      for (int v = 0; v < kSlots; ++v) {
        keep_packed(x_tile[v]);
        keep_packed(dy_tile[v]);
        Real value[Slot::kLanes];
        Real g[Slot::kLanes];
        Slot::unpack(x_tile[v], value);
        Slot::unpack(dy_tile[v], g);
#pragma unroll
        for (int i = 0; i < Slot::kLanes; ++i) {
          const int k = channel_of<kLayout>(i);
          value[i] = apply(projected[k], g[i], value[i] - centre[k]);
        }
        if (v < slots) store_slot<Slot>(to, value, cursor.plane_left, cover);
        to += walk.advance(cursor.plane_left);
      }
    }
  }
}

}  // namespace

int launch_backward(const Problem& p, const Plan& plan, const BackwardParams& params,
                    const Workspace& workspace, cudaStream_t stream) {
  return dispatch(p, plan, [&](auto variant) {
    using V = decltype(variant);
    static Allowed allowed;
    return launch_meeting(allowed, dynamic_shared_bytes(plan, Pass::kBackward),
                          backward_kernel<typename V::T, V::kLayout, V::kSlotBytes>, plan, stream,
                          p, plan, stride(p, plan), params, workspace);
  });
}

}  // namespace brn
