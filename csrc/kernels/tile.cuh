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
  return by_channel(kLayout) ? 0 : lane;
}

// Loads the slots that exist, from the cursor on. All loads are issued before the first use.
template <typename Slot, Reuse kReuse, int kSlots, Layout kLayout>
__device__ __forceinline__ void load_tile(typename Slot::Bits (&tile)[kSlots], const void* tensor,
                                          int slots, Cursor cursor, const Walk<kLayout, Slot>& walk,
                                          const Cover<Slot, kLayout>& cover) {
  const char* from = at(tensor, cursor);
#pragma unroll
  for (int v = 0; v < kSlots; ++v) {
    const bool exists = v < slots && cover.any(cursor.plane_left);
    tile[v] = exists ? Slot::template load<kReuse>(from) : Slot::zero();
    from += walk.advance(cursor.plane_left);
  }
}

// The same of two tensors at once: the slots of both are in flight together.
template <typename Slot, Reuse kReuse, int kSlots, Layout kLayout>
__device__ __forceinline__ void load_tiles(typename Slot::Bits (&a_tile)[kSlots], const void* a,
                                           typename Slot::Bits (&b_tile)[kSlots], const void* b,
                                           int slots, Cursor cursor,
                                           const Walk<kLayout, Slot>& walk,
                                           const Cover<Slot, kLayout>& cover) {
  const char* a_from = at(a, cursor);
  const char* b_from = at(b, cursor);
#pragma unroll
  for (int v = 0; v < kSlots; ++v) {
    const bool exists = v < slots && cover.any(cursor.plane_left);
    a_tile[v] = exists ? Slot::template load<kReuse>(a_from) : Slot::zero();
    b_tile[v] = exists ? Slot::template load<kReuse>(b_from) : Slot::zero();
    const std::int64_t bytes = walk.advance(cursor.plane_left);
    a_from += bytes;
    b_from += bytes;
  }
}

// Stores the slot, or what of it is of the slab.
template <typename Slot, Layout kLayout, typename Real>
__device__ __forceinline__ void store_slot(void* to, const Real (&value)[Slot::kLanes],
                                           int plane_left, const Cover<Slot, kLayout>& cover) {
  if constexpr (kLayout == Layout::kUnaligned) {
    using One = brn::Slot<typename Slot::Element, Slot::kBytes / Slot::kLanes>;
    const unsigned lanes = cover.lanes(plane_left);
    if (lanes != cover.kAll) {
#pragma unroll
      for (int i = 0; i < Slot::kLanes; ++i) {
        const Real alone[1] = {value[i]};
        if (lanes >> i & 1) One::store(static_cast<char*>(to) + i * One::kBytes, alone);
      }
      return;
    }
  }
  Slot::store(to, value);
}

// One channel of a per-channel tensor, or `missing` where there is none.
template <typename Real>
__device__ __forceinline__ Real load_channel(const void* tensor, int channel, Real missing) {
  return tensor ? static_cast<const Real*>(tensor)[channel] : missing;
}

template <typename Real>
__device__ __forceinline__ void expect_channel(const void* tensor, int channel) {
  if (tensor) expect_line(static_cast<const Real*>(tensor) + channel);
}

// Column c of the [kStatRows][C] tensor.
template <typename Real>
__device__ __forceinline__ ChannelStats<Real> stats_of(const void* stats, std::int64_t channels,
                                                       int c) {
  const Real* row = static_cast<const Real*>(stats) + c;
  return {row[0], row[channels], row[2 * channels], row[3 * channels], row[4 * channels]};
}

template <typename Real>
__device__ __forceinline__ void expect_stats(const void* stats, std::int64_t channels, int c) {
  if (!stats) return;
#pragma unroll
  for (int row = 0; row < kStatRows; ++row)
    expect_line(static_cast<const Real*>(stats) + row * channels + c);
}

}  // namespace brn
