// What a plan is: how a problem is cut into blocks, and what follows of it for a kernel, in numbers
// of slots, threads, words and bytes. plan.h chooses one.
//
// A slab is what is reduced together: one channel (kChannelsFirst, kUnaligned), a stripe of
// neighbouring channels (kChannelsLast) or a bundle of them (kBundles). A team of blocks owns a
// slab at a time and keeps it in registers, and in shared memory what they do not hold, between the
// statistics and the normalisation, so that x is read from memory once. Inside a slab, data lies at
// positions; a thread moves one slot, 16 bytes where it can, at one. With lanes = elements of a
// slot:
//
//   kChannelsFirst   position = slot in the channel, N * S / lanes of them
//   kChannelsLast    position = row of the [N*S][C] matrix; `columns` slots side by side, lanes *
//                    columns channels wide
//   kUnaligned       position = slot that meets the channel, N * (S / lanes and a little) of them
//   kBundles         position = image, row of the [N][C*S] matrix; `columns` = S slots side by
//                    side, lanes channels wide
//
// The last two are for planes that are no whole slots: 7 x 7 of two bytes, 19 x 19, 65 x 129. As
// many planes side by side as a slot has lanes are whole slots, whatever S is, and where S is at
// least as large a slot meets two channels at most: bundles, while a block covers one. Larger
// planes go channel by channel in slots of which the first and the last are partly a neighbour's:
// those lanes do not count, and are not written.
#pragma once

#include "divisor.h"
#include "types.h"

#include <cstdint>
#include <ostream>

namespace brn {

enum class Pass : std::uint8_t { kForward, kBackward, kInference };

// Tensors of the problem's size that cross the memory bus: the floor that a kernel is measured
// against.
constexpr int tensors_moved(Pass pass) { return pass == Pass::kBackward ? 3 : 2; }

// Those of them that are read, and held from the statistics to the normalisation.
constexpr int tensors_read(Pass pass) { return tensors_moved(pass) - 1; }

constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;  // of a block, and every kernel's __launch_bounds__
constexpr int kMinThreads = 64;

// Channels of a slab, at most: what the block's shared reduction records are sized for (8 warps x
// 128 x 12 bytes = 12 KB).
constexpr int kMaxSlabChannels = 128;

// Blocks an SM is sure to hold, the second argument of __launch_bounds__. Three keep 8 x 16 bytes a
// thread at 80 registers without spills; a thread of the other layouts also carries the moments of
// each of its lanes and needs 128. Arithmetic in double takes twice the registers; it is there to
// be right, not to be fast.
BRN_HD constexpr int blocks_per_sm(Layout layout, int element_bytes) {
  if (element_bytes == 8) return 1;
  return by_channel(layout) ? 3 : 2;
}

constexpr std::int64_t resident_blocks(const Problem& p, int sm_count) {
  return std::int64_t{sm_count} * blocks_per_sm(p.layout, size_of(p.dtype));
}

// Bytes of tensors that a thread holds in registers: x alone going forward, x and dy going back.
constexpr int kTileBytes = 128;

// Slots of each of those tensors, and never more than 16 of them, where unrolling stops paying.
BRN_HD constexpr int slots_per_thread(Pass pass, int slot_bytes) {
  const int bytes = pass == Pass::kBackward ? kTileBytes / 2 : kTileBytes;
  return bytes / slot_bytes < 16 ? bytes / slot_bytes : 16;
}

// How many partial results of a team a thread has on their way from L2 at a time. Where a slab is a
// stripe of channels it merges up to some hundred of them, and one by one each would cost a way to
// L2 and back; of a channel by itself or of a bundle, one or two. With slots of two bytes the
// forward kernel has registers for four (8: 16 bytes of spills; ptxas, sm_90).
BRN_HD constexpr int records_ahead(Layout layout, int slot_bytes) {
  if (layout != Layout::kChannelsLast) return 1;
  return slot_bytes == 2 ? 4 : 8;
}

// What a block that prefetches has of shared memory for it: a second set of all that its registers
// hold.
constexpr int kPrefetchBytes = kMaxThreads * kTileBytes;

struct Device {
  int sm_count = 132;
  double l2_bytes = 60e6;
  int shared_bytes = 228 << 10;  // shared memory of an SM
  int capability = 90;           // compute capability: 10 * major + minor
};

struct Plan {
  int slot_bytes = 0;      // 16, 8, 4 or 2, a multiple of the element
  int columns = 1;         // slots side by side; 1 in kChannelsFirst, S in kBundles
  int slots = 0;           // a thread keeps in registers
  int threads = 0;         // of a block, a power of two
  int team = 0;            // blocks that share a slab; if several, they meet at a barrier
  int teams = 0;           // slabs in work at a time
  int rounds = 0;          // fillings of the registers for one slab; the last one stays there
  int retained = 0;        // of the others that stay in shared memory; the rest is read twice
  int prefetch = 0;        // slabs on their way to shared memory while the team meets: 0 or 1
  std::int64_t share = 0;  // positions of a slab that a block owns, the last of a team maybe fewer
  std::int64_t slabs = 0;  // in all

  BRN_HD constexpr int positions_per_pass() const { return threads / columns; }
  BRN_HD constexpr std::int64_t positions_per_round() const {
    return std::int64_t{slots} * positions_per_pass();
  }
  // Which rounds are retained, and in which place: full ones first, so the ragged one, round 0,
  // only if all are. The oldest of the full ones: L2 has the newest of the rest.
  BRN_HD constexpr int retained_place(int round) const {
    return retained + 1 < rounds ? round - 1 : round;
  }
  BRN_HD constexpr bool retains(int round) const {
    const int place = retained_place(round);
    return 0 <= place && place < retained;
  }
  constexpr std::int64_t blocks() const { return std::int64_t{team} * teams; }
  constexpr std::int64_t waves() const { return teams > 0 ? ceil_div(slabs, teams) : 0; }

  friend constexpr bool operator==(const Plan& a, const Plan& b) {
    return a.slot_bytes == b.slot_bytes && a.columns == b.columns && a.slots == b.slots &&
           a.threads == b.threads && a.team == b.team && a.teams == b.teams &&
           a.rounds == b.rounds && a.retained == b.retained && a.prefetch == b.prefetch &&
           a.share == b.share && a.slabs == b.slabs;
  }

  friend std::ostream& operator<<(std::ostream& os, const Plan& p) {
    return os << "Plan{.slot_bytes = " << p.slot_bytes << ", .columns = " << p.columns
              << ", .slots = " << p.slots << ", .threads = " << p.threads << ", .team = " << p.team
              << ", .teams = " << p.teams << ", .rounds = " << p.rounds
              << ", .retained = " << p.retained << ", .prefetch = " << p.prefetch
              << ", .share = " << p.share << ", .slabs = " << p.slabs << "}";
  }
};

constexpr int lanes(const Problem& p, const Plan& plan) {
  return plan.slot_bytes / size_of(p.dtype);
}

// How the plan sees the problem.
constexpr Layout layout_of(const Problem& p, const Plan& plan) {
  if (p.layout != Layout::kChannelsFirst) return p.layout;
  if (plan.columns > 1) return Layout::kBundles;
  const int lanes = brn::lanes(p, plan);  // 0 of a plan that no kernel can run
  return lanes == 0 || p.spatial % lanes == 0 ? Layout::kChannelsFirst : Layout::kUnaligned;
}
constexpr Problem as_planned(Problem p, const Plan& plan) {
  p.layout = layout_of(p, plan);
  return p;
}

constexpr int slab_channels(const Problem& p, const Plan& plan) {
  switch (layout_of(p, plan)) {
    case Layout::kChannelsFirst:
    case Layout::kUnaligned: return 1;
    case Layout::kBundles: return lanes(p, plan);
    default: return plan.columns * lanes(p, plan);
  }
}

// Slots of a channel's plane; in kUnaligned, where that depends on the lane it begins in, at most.
constexpr std::int64_t plane_slots(const Problem& p, const Plan& plan) {
  const int lanes = brn::lanes(p, plan);
  return (p.spatial + (layout_of(p, plan) == Layout::kUnaligned ? 2 * lanes - 2 : 0)) / lanes;
}

constexpr std::int64_t positions(const Problem& p, const Plan& plan) {
  switch (layout_of(p, plan)) {
    case Layout::kChannelsFirst:
    case Layout::kUnaligned: return p.batch * plane_slots(p, plan);
    case Layout::kBundles: return p.batch;
    default: return p.reduced();
  }
}

// Elements of a channel at a position; in kUnaligned at most.
constexpr int values_per_position(const Problem& p, const Plan& plan) {
  switch (layout_of(p, plan)) {
    case Layout::kChannelsFirst:
    case Layout::kUnaligned: return lanes(p, plan);
    case Layout::kBundles: return static_cast<int>(p.spatial);
    default: return 1;
  }
}

constexpr std::int64_t kMostInt = 0x7fffffff;

// Positions that a block owns, at most, so that they are counted in 32 bits, a round beyond their
// end included. A slab with more for each resident block has over 2^38 slots on an H200.
constexpr std::int64_t kMostShare = std::int64_t{1} << 30;

// Elements of a plane in kUnaligned: enough for a slot to have its first lane or its last, and so
// few that lanes are counted in 32 bits.
constexpr std::int64_t kLeastUnaligned = 8;
constexpr std::int64_t kMostUnaligned = std::int64_t{1} << 30;

// Channels, at most: blocks count slabs in 32 bits, a wave beyond the last one included.
constexpr std::int64_t kMostChannels = std::int64_t{1} << 30;

// How a thread steps from one of its slots to the next, a block's whole pass further on. Computed
// once on the host, so that the kernels find it in constant memory and spend neither registers nor
// divisions on it. `plane` counts slots; in kChannelsLast there are none, and in kBundles they are
// the columns.
struct Stride {
  std::int64_t step = 0;       // bytes from a slot to the next
  std::int64_t leap = 0;       // bytes when that leaves the plane: over the other channels' planes
  std::int64_t plane = 1;      // slots of a plane
  int plane_slots = 1;         // the same, or 2^31 - 1 where that is less
  int plane_step = 0;          // slots that a step moves on inside a plane
  int pass = 0;                // positions that a block covers at once
  int share = 0;               // positions that a block owns, the last of a team maybe fewer
  int values = 1;              // elements of a channel at a position
  int beyond = 0;              // kUnaligned: lanes of a plane's slots without an element of it
  std::int64_t positions = 0;  // of a slab
  Divisor by_plane;
  Divisor by_pass;  // kBundles; elsewhere it is a power of two
  Divisor by_team;
};

constexpr Stride stride(const Problem& p, const Plan& plan) {
  Stride s;
  s.positions = positions(p, plan);
  s.values = values_per_position(p, plan);
  s.pass = plan.positions_per_pass();
  s.share = static_cast<int>(plan.share);
  s.by_team = Divisor(plan.team);
  const Layout layout = layout_of(p, plan);
  if (layout == Layout::kChannelsLast) {
    s.step = s.pass * p.channels * size_of(p.dtype);
    return s;
  }
  if (layout == Layout::kBundles) {
    s.plane = plan.columns;
    s.by_plane = Divisor(s.plane);
    s.by_pass = Divisor(s.pass);
    s.step = s.pass * p.channels * p.spatial * size_of(p.dtype);
    return s;
  }
  s.plane = plane_slots(p, plan);
  if (layout == Layout::kUnaligned)
    s.beyond = static_cast<int>(s.plane * lanes(p, plan) - p.spatial);
  s.plane_slots = static_cast<int>(s.plane < kMostInt ? s.plane : kMostInt);
  s.by_plane = Divisor(s.plane);
  const std::int64_t planes = s.pass / s.plane;
  s.plane_step = static_cast<int>(s.pass - planes * s.plane);
  s.step = planes * p.channels * p.spatial * size_of(p.dtype) +
           std::int64_t{s.plane_step} * plan.slot_bytes;
  s.leap = s.step + p.channels * p.spatial * size_of(p.dtype) - s.plane * plan.slot_bytes;
  return s;
}

// Control words of a launch: a line for the ticket of the step counter and the flags, then a line a
// team for its barrier. A line is 128 bytes, so that polling one does not disturb another.
constexpr int kLineWords = 32;
constexpr std::int64_t control_words(int teams) { return std::int64_t{kLineWords} * (1 + teams); }

// Two sets of partial results a team: a fast block may already publish the next slab while a slow
// one reads this one.
constexpr std::int64_t partials_bytes(const Problem& p, const Plan& plan) {
  return plan.team > 1 ? 2 * plan.blocks() * slab_channels(p, plan) * 2 * size_of_statistic(p.dtype)
                       : 0;
}

// The moving averages that a launch with skip_nonfinite would leave, until its last block knows
// whether they count.
constexpr std::int64_t proposals_bytes(const Problem& p) {
  return 2 * p.channels * size_of_statistic(p.dtype);
}

// The widest access, up to 16 bytes, that tiles a row (a plane of a channel, or the channels of a
// pixel) exactly.
constexpr int widest_slot(const Problem& p) {
  const std::int64_t row =
      (p.layout == Layout::kChannelsFirst ? p.spatial : p.channels) * size_of(p.dtype);
  int bytes = 16;
  while (bytes > size_of(p.dtype) && (row % bytes != 0 || p.alignment % bytes != 0)) bytes /= 2;
  return bytes;
}

// Records that threads of a bundle hand on: of each of two channels. Elsewhere warps do.
constexpr int kBundleRecords = 2 * kMaxThreads;

// Shared memory that a block takes beside what it asks for, at most: a record of each warp and what
// is known of each channel of the slab, 8 x 3 + 9 statistics, and a few words. A bundle has 8
// channels at most, and records of its threads beside.
constexpr int static_shared_bytes(const Problem& p) {
  const int channels = by_channel(p.layout)           ? 1
                       : p.layout == Layout::kBundles ? 8
                                                      : kMaxSlabChannels;
  const int more = p.layout == Layout::kBundles ? 3 * kBundleRecords : 0;
  return (channels * (kMaxThreads / kWarp * 3 + 9) + more) * size_of_statistic(p.dtype) + 96;
}

// Shared memory that is left for a block to ask for while an SM holds as many blocks as ever; may
// be negative. The SM keeps 1 KB a block (from sm_80 on) and hands out multiples of 128 bytes; one
// block may have all the rest.
constexpr int shared_room(const Problem& p, const Device& device) {
  const int block = device.shared_bytes / blocks_per_sm(p.layout, size_of(p.dtype));
  return block / 128 * 128 - 1024 - static_shared_bytes(p);
}

// Whether the kernels can copy a team's next slab to shared memory while it waits at its barrier:
// the device has such copies (of 4, 8 and 16 bytes), there is a next slab, one round keeps it, and
// there is room.
constexpr bool can_prefetch(const Problem& p, const Device& device, const Plan& plan) {
  return device.capability >= 80 && plan.slot_bytes >= 4 && plan.team > 1 && plan.rounds == 1 &&
         plan.waves() > 1 && kPrefetchBytes <= shared_room(p, device);
}

// What a retained round takes of shared memory, with full blocks.
constexpr int retained_round_bytes(const Plan& plan, Pass pass) {
  return kMaxThreads * plan.slots * plan.slot_bytes * tensors_read(pass);
}

// How many rounds there is room to retain. On any device: a thread stores and loads them.
constexpr int most_retained(const Problem& p, const Device& device, const Plan& plan, Pass pass) {
  const int room = shared_room(p, device);
  return room > 0 ? room / retained_round_bytes(plan, pass) : 0;
}

// Shared memory that a block asks for.
constexpr int dynamic_shared_bytes(const Plan& plan, Pass pass) {
  return plan.prefetch ? kPrefetchBytes : plan.retained * retained_round_bytes(plan, pass);
}

}  // namespace brn
