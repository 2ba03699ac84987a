// Who this thread is and where its slots lie: the map from plan to memory. No arithmetic on data.
#pragma once

#include "../core/divisor.h"
#include "../core/geometry.h"
#include "registers.cuh"

#include <cuda_runtime.h>

#include <cstdint>

namespace brn {

// The channels that a thread keeps apart: all elements of a slot belong to one channel, or each is
// taken to have its own. In kUnaligned lanes may belong to none: see Cover. In kBundles that are
// lanes of two channels, which bundle.cuh puts together.
template <typename Slot, Layout kLayout>
constexpr int kThreadChannels = by_channel(kLayout) ? 1 : Slot::kLanes;

// The channels that a slab has at most.
template <typename Slot, Layout kLayout>
constexpr int kMostSlabChannels = by_channel(kLayout)                       ? 1
                                  : kLayout == Layout::kBundles             ? Slot::kLanes
                                  : kWarp * Slot::kLanes < kMaxSlabChannels ? kWarp * Slot::kLanes
                                                                            : kMaxSlabChannels;

// Which channel each lane of a thread's slots belongs to: in kChannelsLast the next lane's is the
// next one.
template <Layout kLayout>
struct Owned {
  int first = 0;  // that of lane 0
  int split = 0;  // kBundles: lanes of that channel, the others are the next one's

  __device__ __forceinline__ int operator[](int lane) const {
    if constexpr (kLayout == Layout::kBundles) return first + (lane < split ? 0 : 1);
    return by_channel(kLayout) ? first : first + lane;
  }

  // Gives each lane's channel what f(channel) is; in kBundles after two calls, not one a lane, but
  // a select between loads waits for them.
  template <typename Value, int kCount, typename F>
  __device__ __forceinline__ void each(Value (&values)[kCount], F f) const {
    if constexpr (kLayout == Layout::kBundles) {
      const Value lower = f(first);
      const Value upper = f(split < kCount ? first + 1 : first);
#pragma unroll
      for (int k = 0; k < kCount; ++k) values[k] = k < split ? lower : upper;
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) values[k] = f(first + k);
    }
  }
};

__device__ __forceinline__ int saturated(std::int64_t n) {
  return static_cast<int>(n < kMostInt ? (n > 0 ? n : 0) : kMostInt);
}

// The slot that a thread is at. 32 bits are enough for what is left of a plane: where that is more,
// no round reaches the plane's end.
struct Cursor {
  std::int64_t offset;  // its first byte, counted from the tensor's
  int plane_left;       // by_channel(): slots to the end of the plane, this one included
};

// Which elements of a thread's slots are of its slab: all.
template <typename Slot, Layout kLayout>
struct Cover {
  __device__ __forceinline__ static constexpr bool any(int) { return true; }
};

// All but those of the channels before and behind, in the first and the last slots of a plane.
template <typename Slot>
struct Cover<Slot, Layout::kUnaligned> {
  static constexpr unsigned kAll = (1u << Slot::kLanes) - 1;
  int slots;   // of a plane
  int before;  // lanes in front of the plane's first element
  int beyond;  // behind its last one

  __device__ __forceinline__ bool any(int plane_left) const {
    return plane_left * Slot::kLanes > beyond;
  }

  // A bit for each lane.
  __device__ __forceinline__ unsigned lanes(int plane_left) const {
    int left = plane_left * Slot::kLanes - beyond;
    left = left > 0 ? left : 0;
    const unsigned here = left < Slot::kLanes ? (1u << left) - 1 : kAll;
    return plane_left == slots ? here >> before << before : here;
  }
};

// The way is computed again from here. Otherwise the compiler keeps the address of every slot from
// the loads to the stores: 16 registers, and up to 100 bytes of spills (ptxas, sm_90, 16-byte slots
// of kChannelsFirst).
__device__ __forceinline__ void forget_the_way(Cursor& cursor) {
  compute_here(cursor.offset);
  compute_here(cursor.plane_left);
}

__device__ __forceinline__ const char* at(const void* tensor, const Cursor& cursor) {
  return static_cast<const char*>(tensor) + cursor.offset;
}
__device__ __forceinline__ char* at(void* tensor, const Cursor& cursor) {
  return static_cast<char*>(tensor) + cursor.offset;
}

// A thread's part of its team's slabs.
template <Layout kLayout, typename Slot>
class Walk {
  static constexpr int kLanes = Slot::kLanes;

 public:
  __device__ __forceinline__ Walk(const Plan& plan, const Stride& stride)
      : plan_(plan), stride_(stride) {}

  __device__ __forceinline__ int team() const {
    return static_cast<int>(stride_.by_team.quotient(blockIdx.x));
  }
  __device__ __forceinline__ int rank() const {
    return static_cast<int>(blockIdx.x) - team() * plan_.team;
  }

  // Channels of a slab, and those of them that there are: the last slab may end beyond C.
  __device__ __forceinline__ int channels() const {
    if constexpr (kLayout == Layout::kBundles) return kLanes;
    return by_channel(kLayout) ? 1 : plan_.columns * kLanes;
  }

  __device__ __forceinline__ int channels(const Problem& p, int channel0) const {
    if constexpr (kLayout != Layout::kChannelsLast) return channels();
    const std::int64_t left = p.channels - channel0;
    return left < channels() ? static_cast<int>(left) : channels();
  }

  // Which of the slots side by side is this thread's.
  __device__ __forceinline__ int column() const {
    if constexpr (kLayout == Layout::kBundles) return thread() - row() * plan_.columns;
    return by_channel(kLayout) ? 0 : thread() & (plan_.columns - 1);
  }

  // Whether this thread's are among the channels of the slab that there are, and its position among
  // those that the block covers at once.
  __device__ __forceinline__ bool in_range(int there) const {
    if constexpr (kLayout == Layout::kBundles) return row() < stride_.pass;
    return by_channel(kLayout) || column() * kLanes < there;
  }

  __device__ __forceinline__ Owned<kLayout> owned() const {
    if constexpr (kLayout == Layout::kBundles) {
      const int element = column() * kLanes;
      const int first = static_cast<int>(stride_.by_plane.quotient(element));
      return {first, (first + 1) * plan_.columns - element};
    } else {
      return {column() * kThreadChannels<Slot, kLayout>, 0};
    }
  }

  // The same of all channels; of the last column's where the slab has none of this thread's.
  __device__ __forceinline__ Owned<kLayout> owned(const Problem& p, int channel0) const {
    Owned<kLayout> owned = this->owned();
    owned.first += channel0;
    if constexpr (kLayout == Layout::kChannelsLast) {
      const int last = static_cast<int>(p.channels) - kLanes;
      owned.first = owned.first < last ? owned.first : last;
    }
    return owned;
  }

  __device__ __forceinline__ int pass() const { return stride_.pass; }

  // Where the first values of this thread's channels lie; in kBundles, of the slab's.
  __device__ __forceinline__ std::int64_t first_element(const Problem& p, int channel0) const {
    return kLayout == Layout::kChannelsLast ? owned(p, channel0).first : channel0 * p.spatial;
  }

  // Which piece of the share a round takes, where pieces fill the registers and only the last may
  // be ragged: that one first, so that what stays in registers after all rounds is a full piece. A
  // loop over rounds carries `piece = round++`, which costs fewer registers than asking each time.
  __device__ __forceinline__ int piece(int round) const {
    return (round > 0 ? round : plan_.rounds) - 1;
  }

  // How many slots the thread has from its first of a piece on: slot v exists if v < slots(piece).
  // Perhaps more than the piece has.
  __device__ __forceinline__ int slots(int piece) const {
    const int left = share() - position(piece) + stride_.pass - 1;
    if (left <= 0) return 0;
    if constexpr (kLayout == Layout::kBundles)
      return static_cast<int>(stride_.by_pass.quotient(left));
    return left >> bits_of(stride_.pass);
  }

  // Where the first slot of a piece of a slab lies.
  __device__ __forceinline__ Cursor begin(const Problem& p, int channel0, int piece) const {
    constexpr int kSize = Slot::kBytes / kLanes;
    const std::int64_t at = std::int64_t{rank()} * stride_.share + position(piece);
    if constexpr (kLayout == Layout::kChannelsLast) {
      return {(at * p.channels + channel0) * kSize + column() * Slot::kBytes, 0};
    } else if constexpr (kLayout == Layout::kBundles) {
      return {(at * p.channels + channel0) * p.spatial * kSize + column() * Slot::kBytes, 0};
    } else {
      const std::int64_t plane = this->plane(at);
      const std::int64_t inside = at - plane * stride_.plane;
      std::int64_t first = (plane * p.channels + channel0) * p.spatial * kSize;
      if constexpr (kLayout == Layout::kUnaligned) first &= -std::int64_t{Slot::kBytes};
      return {first + inside * Slot::kBytes, saturated(stride_.plane - inside)};
    }
  }

  // Which elements of a slab's slots are of the slab.
  __device__ __forceinline__ Cover<Slot, kLayout> cover(const Problem& p, int channel0) const {
    if constexpr (kLayout == Layout::kUnaligned) {
      const unsigned first = static_cast<unsigned>(channel0) * static_cast<unsigned>(p.spatial);
      const int before = static_cast<int>(first % kLanes);
      return {stride_.plane_slots, before, stride_.beyond - before};
    } else {
      return {};
    }
  }

  // kUnaligned: elements of the channel that the blocks of lower rank own.
  __device__ __forceinline__ std::int64_t values_before(const Problem& p, int channel0,
                                                        int rank) const {
    std::int64_t at = std::int64_t{rank} * stride_.share;
    at = at < stride_.positions ? at : stride_.positions;
    const std::int64_t plane = this->plane(at);
    const int inside =
        static_cast<int>(at - plane * stride_.plane) * kLanes - cover(p, channel0).before;
    const int spatial = static_cast<int>(p.spatial);
    return plane * p.spatial + (inside < 0 ? 0 : inside < spatial ? inside : spatial);
  }

  // Moves on to the next slot, which is returned bytes further on.
  __device__ __forceinline__ std::int64_t advance(int& plane_left) const {
    if constexpr (!by_channel(kLayout)) return stride_.step;
    plane_left -= stride_.plane_step;
    if (plane_left > 0) return stride_.step;
    plane_left += stride_.plane_slots;
    return stride_.leap;
  }

 private:
  __device__ __forceinline__ static int thread() {
    int thread = static_cast<int>(threadIdx.x);
    compute_here(thread);
    return thread;
  }

  // Which of the positions that the block covers at once is this thread's; in kBundles beyond them
  // if it has none.
  __device__ __forceinline__ int row() const {
    if constexpr (by_channel(kLayout)) return thread();
    if constexpr (kLayout == Layout::kBundles)
      return static_cast<int>(stride_.by_plane.quotient(thread()));
    return thread() >> bits_of(plan_.columns);
  }

  // by_channel(): the plane that a position is in.
  __device__ __forceinline__ std::int64_t plane(std::int64_t at) const {
    return at <= kMostInt ? stride_.by_plane.quotient(static_cast<unsigned>(at))
                          : at / stride_.plane;
  }

  // Positions of a slab that the block owns.
  __device__ __forceinline__ int share() const {
    const std::int64_t left = stride_.positions - std::int64_t{rank()} * stride_.share;
    return left < stride_.share ? static_cast<int>(left) : stride_.share;
  }

  // The thread's first of a piece, counted from the block's first.
  __device__ __forceinline__ int position(int piece) const {
    return piece * plan_.slots * stride_.pass + row();
  }

  const Plan& plan_;
  const Stride& stride_;
};

}  // namespace brn
