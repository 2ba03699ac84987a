// A tile: the slots of one thread and one round, packed in registers.
#pragma once

#include "../core/math.h"
#include "reduce.cuh"
#include "slab.cuh"
#include "vector.cuh"

#include <cuda_runtime.h>

namespace brn {

// Which of its thread's channels an element of a slot belongs to.
template <Layout kLayout>
__device__ __forceinline__ constexpr int channel_of(int lane) {
  return kLayout == Layout::kChannelsFirst ? 0 : lane;
}

// Loads the slots that exist, from the cursor on, which moves behind the round. All loads are
// issued before the first use.
template <typename Slot, Reuse kReuse, int kSlots, typename T, typename Walk>
__device__ __forceinline__ void load_tile(typename Slot::Bits (&tile)[kSlots], const T* tensor,
                                          int left, Cursor& cursor, const Walk& walk) {
#pragma unroll
  for (int v = 0; v < kSlots; ++v) {
    tile[v] =
        walk.has(v, left) ? Slot::template load<kReuse>(tensor + cursor.offset) : Slot::zero();
    walk.advance(cursor);
  }
}

// The same of two tensors at once: the slots of both are in flight together.
template <typename Slot, Reuse kReuse, int kSlots, typename T, typename Walk>
__device__ __forceinline__ void load_tiles(typename Slot::Bits (&a_tile)[kSlots], const T* a,
                                           typename Slot::Bits (&b_tile)[kSlots], const T* b,
                                           int left, Cursor& cursor, const Walk& walk) {
#pragma unroll
  for (int v = 0; v < kSlots; ++v) {
    const bool exists = walk.has(v, left);
    a_tile[v] = exists ? Slot::template load<kReuse>(a + cursor.offset) : Slot::zero();
    b_tile[v] = exists ? Slot::template load<kReuse>(b + cursor.offset) : Slot::zero();
    walk.advance(cursor);
  }
}

// One channel of a per-channel tensor, or `missing` where there is none.
template <typename Real>
__device__ __forceinline__ Real load_channel(const void* tensor, int channel, Real missing) {
  return tensor ? static_cast<const Real*>(tensor)[channel] : missing;
}

// Column c of the [kStatRows][C] tensor.
template <typename Real>
__device__ __forceinline__ ChannelStats<Real> stats_of(const void* stats, std::int64_t channels,
                                                       int c) {
  const Real* row = static_cast<const Real*>(stats) + c;
  return {row[0], row[channels], row[2 * channels], row[3 * channels], row[4 * channels]};
}

}  // namespace brn
