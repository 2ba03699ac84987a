// Who this thread is and where its slots lie: the map from plan to memory. No arithmetic on data.
#pragma once

#include "../core/plan.h"

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

namespace brn {

// The channels that a thread meets: all elements of a slot belong to one channel, or each to its
// own.
template <typename Slot, Layout kLayout>
constexpr int kThreadChannels = kLayout == Layout::kChannelsFirst ? 1 : Slot::kLanes;

// The channels that a slab has at most.
template <typename Slot, Layout kLayout>
constexpr int kMostSlabChannels =
    kLayout == Layout::kChannelsFirst
        ? 1
        : (kWarp * Slot::kLanes < kMaxSlabChannels ? kWarp * Slot::kLanes : kMaxSlabChannels);

__device__ __forceinline__ int saturated(std::int64_t n) {
  return n < INT_MAX ? static_cast<int>(n > 0 ? n : 0) : INT_MAX;
}

struct Quotient {
  std::int64_t quotient;
  std::int64_t remainder;
};

// 64-bit division takes about four times as long as 32-bit, and stands before the first load of a
// slab.
__device__ __forceinline__ Quotient divide(std::int64_t a, std::int64_t b) {
  if (((a | b) >> 32) == 0) {
    const unsigned q = static_cast<unsigned>(a) / static_cast<unsigned>(b);
    return {q, a - static_cast<std::int64_t>(q) * b};
  }
  const std::int64_t q = a / b;
  return {q, a - q * b};
}

// The slot that a thread is at. 32 bits are enough for what is left of a plane: where a plane has
// more slots than that, no round reaches its end.
struct Cursor {
  std::int64_t offset;  // its first element, counted from the slab's
  int plane_left;       // kChannelsFirst: slots to the end of the plane, this one included
};

// Makes the compiler compute the way from here again. Otherwise it keeps the address of every slot
// from the loads to the stores: 16 registers, and up to 100 bytes of spills (ptxas, sm_90, 16-byte
// slots of kChannelsFirst).
__device__ __forceinline__ void forget_the_way(Cursor& cursor) {
#if defined(__CUDACC__)
  asm volatile("" : "+l"(cursor.offset), "+r"(cursor.plane_left));
#else
  (void)cursor;
#endif
}

// A thread's part of its team's slabs.
template <Layout kLayout, int kLanes>
class Walk {
 public:
  __device__ __forceinline__ Walk(const Plan& plan, const Stride& stride)
      : plan_(plan), stride_(stride) {}

  __device__ __forceinline__ int team() const {
    return static_cast<int>(blockIdx.x / static_cast<unsigned>(plan_.team));
  }
  __device__ __forceinline__ int rank() const {
    return static_cast<int>(blockIdx.x % static_cast<unsigned>(plan_.team));
  }

  // Which of the slots side by side is this thread's.
  __device__ __forceinline__ int column() const {
    return kLayout == Layout::kChannelsFirst ? 0 : static_cast<int>(threadIdx.x) % plan_.columns;
  }

  // Where a slab lies in a tensor, and whether it has this thread's channels: the last one may end
  // beyond C.
  __device__ __forceinline__ std::int64_t slab_offset(const Problem& p, int channel0) const {
    return kLayout == Layout::kChannelsFirst ? channel0 * p.spatial : channel0;
  }
  __device__ __forceinline__ bool in_range(const Problem& p, int channel0) const {
    return kLayout == Layout::kChannelsFirst || channel0 + column() * kLanes < p.channels;
  }

  // Which piece of the share a round takes, where pieces fill the registers and only the last may
  // be ragged: that one first, so that what stays in registers after all rounds is a full piece. A
  // loop over rounds carries `piece = round++`, which costs fewer registers than asking each time.
  __device__ __forceinline__ int piece(int round) const {
    return (round > 0 ? round : plan_.rounds) - 1;
  }

  // Positions of the block's share from this thread's first of a piece on. Its slot v exists if
  // has(v, left).
  __device__ __forceinline__ int left(int piece) const {
    const std::int64_t share_end = (rank() + std::int64_t{1}) * plan_.share;
    return saturated((share_end < stride_.positions ? share_end : stride_.positions) -
                     position(piece));
  }
  __device__ __forceinline__ bool has(int v, int left) const { return v * stride_.pass < left; }

  // Where the first slot of a piece lies.
  __device__ __forceinline__ Cursor begin(const Problem& p, int piece) const {
    const std::int64_t at = position(piece);
    if constexpr (kLayout == Layout::kChannelsLast) {
      return {at * p.channels + column() * kLanes, 0};
    } else {
      const Quotient plane = divide(at, stride_.plane);
      return {plane.quotient * p.channels * p.spatial + plane.remainder * kLanes,
              saturated(stride_.plane - plane.remainder)};
    }
  }

  __device__ __forceinline__ void advance(Cursor& cursor) const {
    cursor.offset += stride_.step;
    if constexpr (kLayout == Layout::kChannelsFirst) {
      cursor.plane_left -= stride_.plane_step;
      if (cursor.plane_left <= 0) {
        cursor.plane_left += saturated(stride_.plane);
        cursor.offset += stride_.gap;
      }
    }
  }

 private:
  __device__ __forceinline__ std::int64_t position(int piece) const {
    const int row = kLayout == Layout::kChannelsFirst
                        ? static_cast<int>(threadIdx.x)
                        : static_cast<int>(threadIdx.x) / plan_.columns;
    return rank() * plan_.share + piece * (std::int64_t{plan_.slots} * stride_.pass) + row;
  }

  const Plan& plan_;
  const Stride& stride_;
};

}  // namespace brn
