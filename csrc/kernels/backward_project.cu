// dx of one rank, with the sums of all, in one launch: 2 reads + 1 write, the floor. Blocks never
// meet: `team` is only the number of blocks that a slab is cut into, one round each.
#include "../core/ranks.h"
#include "launch.cuh"
#include "launch.h"
#include "slab.cuh"
#include "sums.cuh"
#include "tile.cuh"
#include "vector.cuh"

#include <cuda_runtime.h>

namespace brn {
namespace {

template <typename Real>
__device__ __forceinline__ Projection<Real> projection_of(const BackwardProjectParams& params,
                                                          const Problem& p, int c) {
  const Sums<Real> sums = {static_cast<Real>(params.sums[c]),
                           static_cast<Real>(params.sums[p.channels + c])};
  return projection(sums, static_cast<Real>(params.total[0]),
                    stats_of<Real>(params.stats, p.channels, c),
                    load_channel(params.weight, c, Real(1)), true);
}

template <typename T, Layout kLayout, int kSlotBytes>
__global__ void __launch_bounds__(kMaxThreads, blocks_per_sm(kLayout, sizeof(T)))
    backward_project_kernel(Problem p, Plan plan, Stride stride, BackwardProjectParams params) {
  using Slot = brn::Slot<T, kSlotBytes>;
  using Real = RealOf<T>;
  constexpr int kSlots = slots_per_thread(Pass::kBackward, kSlotBytes);
  constexpr int kChannels = kThreadChannels<Slot, kLayout>;

  const Walk<kLayout, Slot> walk(plan, stride);
  const int channel0 = walk.team() * walk.channels();
  if (!walk.in_range(walk.channels(p, channel0))) return;
  const T* const x = static_cast<const T*>(params.x);
  const T* const dy = static_cast<const T*>(params.dy);
  T* const dx = static_cast<T*>(params.dx);

  const int slots = walk.slots(0);
  const Cover<Slot, kLayout> cover = walk.cover(p, channel0);
  const Cursor first = walk.begin(p, channel0, 0);
  Cursor cursor = first;
  typename Slot::Bits x_tile[kSlots];
  typename Slot::Bits dy_tile[kSlots];
  load_tiles<Slot, Reuse::kOnce>(x_tile, x, dy_tile, dy, slots, cursor, walk, cover);

  Real centre[kChannels];
  Projection<Real> projected[kChannels];
  const Owned<kLayout> owned = walk.owned(p, channel0);
  owned.each(centre, [&](int c) { return centre_of<Real>(params.stats, c); });
  owned.each(projected, [&](int c) { return projection_of<Real>(params, p, c); });

  cursor = first;
  forget_the_way(cursor);
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

}  // namespace

int launch_backward_project(const Problem& p, const Plan& plan, const BackwardProjectParams& params,
                            cudaStream_t stream) {
  return dispatch(p, plan, [&](auto variant) {
    using V = decltype(variant);
    return launch(backward_project_kernel<typename V::T, V::kLayout, V::kSlotBytes>, plan, false,
                  stream, p, plan, stride(p, plan), params);
  });
}

}  // namespace brn
