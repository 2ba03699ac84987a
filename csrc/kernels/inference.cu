// y = (x - centre) * scale + shift in one launch: 1 read + 1 write, the floor. Blocks never meet:
// `team` is only the number of blocks that a slab is cut into, one round each.
//
// The constants come from the running statistics (inference), or from the statistics of an earlier
// training forward, which is then repeated without taking them again (activation checkpointing).
#include "launch.cuh"
#include "launch.h"
#include "slab.cuh"
#include "tile.cuh"
#include "vector.cuh"

#include <cuda_runtime.h>

namespace brn {
namespace {

template <typename Real>
__device__ __forceinline__ Affine<Real> affine_of(const InferenceParams& params, const Problem& p,
                                                  int c) {
  const Real weight = load_channel(params.weight, c, Real(1));
  const Real bias = load_channel(params.bias, c, Real(0));
  if (!params.stats) {
    return inference_affine<Real>({static_cast<const Real*>(params.running_mean)[c],
                                   static_cast<const Real*>(params.running_std)[c]},
                                  weight, bias);
  }
  return training_affine(stats_of<Real>(params.stats, p.channels, c), weight, bias);
}

template <typename T, Layout kLayout, int kSlotBytes>
__global__ void __launch_bounds__(kMaxThreads, blocks_per_sm(kLayout, sizeof(T)))
    inference_kernel(Problem p, Plan plan, Stride stride, InferenceParams params) {
  using Slot = brn::Slot<T, kSlotBytes>;
  using Real = RealOf<T>;
  constexpr int kSlots = slots_per_thread(Pass::kInference, kSlotBytes);
  constexpr int kChannels = kThreadChannels<Slot, kLayout>;

  const Walk<kLayout, Slot> walk(plan, stride);
  const int channel0 = walk.team() * walk.channels();
  if (!walk.in_range(walk.channels(p, channel0))) return;
  const T* const x = static_cast<const T*>(params.x);
  T* const y = static_cast<T*>(params.y);

  const int slots = walk.slots(0);
  const Cover<Slot, kLayout> cover = walk.cover(p, channel0);
  const Cursor first = walk.begin(p, channel0, 0);
  Cursor cursor = first;
  typename Slot::Bits tile[kSlots];
  load_tile<Slot, Reuse::kOnce>(tile, x, slots, cursor, walk, cover);

  Affine<Real> affine[kChannels];
  walk.owned(p, channel0).each(affine, [&](int c) { return affine_of<Real>(params, p, c); });

  cursor = first;
  forget_the_way(cursor);
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

}  // namespace

int launch_inference(const Problem& p, const Plan& plan, const InferenceParams& params,
                     cudaStream_t stream) {
  return dispatch(p, plan, [&](auto variant) {
    using V = decltype(variant);
    return launch(inference_kernel<typename V::T, V::kLayout, V::kSlotBytes>, plan, false, stream,
                  p, plan, stride(p, plan), params);
  });
}

}  // namespace brn
