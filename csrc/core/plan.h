// How a problem is cut into blocks: pure functions of sizes, so that the whole decision can be read
// from Python and tested for every shape on a machine without a GPU.
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

// Bytes that are read a second time. The first round takes the ragged end of a block's share, the
// last one a full round before it, which stays in registers, and full ones before that stay in
// shared memory.
constexpr std::int64_t bytes_reread(const Problem& p, const Plan& plan, Pass pass) {
  if (plan.retained + 1 >= plan.rounds) return 0;
  const std::int64_t total = positions(p, plan);
  const std::int64_t round = plan.positions_per_round();
  const std::int64_t before = (plan.rounds - 2) * round;
  const std::int64_t shared = plan.retained * round;
  const std::int64_t last_share = total - (plan.team - 1) * plan.share;
  const std::int64_t last_rest = last_share > before ? last_share - before : 0;
  const std::int64_t last_held =
      (last_share < shared ? last_share : shared) + (last_rest < round ? last_rest : round);
  const std::int64_t again =
      (plan.team - 1) * (plan.share - round - shared) + last_share - last_held;
  return tensors_read(pass) * again * ceil_div(p.elements(), total) * size_of(p.dtype);
}

// Those of them that are in work at a time. A team of one waits for nobody and has a slab of its
// own, but only the resident blocks run.
constexpr std::int64_t bytes_in_flight(const Problem& p, const Plan& plan, const Device& device,
                                       Pass pass) {
  const std::int64_t fit = resident_blocks(p, device.sm_count) / plan.team;
  const std::int64_t at_once = fit < plan.teams ? (fit > 1 ? fit : 1) : plan.teams;
  return bytes_reread(p, plan, pass) * at_once / plan.slabs;
}

// Those of them that L2 no longer holds when they are read again, newest first. It is expected to
// hold 28 of an H200's 60 MB, and the same part of another chip's.
constexpr std::int64_t bytes_missed(const Problem& p, const Plan& plan, const Device& device,
                                    Pass pass) {
  const double in_flight = static_cast<double>(bytes_in_flight(p, plan, device, pass));
  const double reach = 28.0 / 60.0 * device.l2_bytes;
  if (in_flight <= reach) return 0;
  return static_cast<std::int64_t>(static_cast<double>(bytes_reread(p, plan, pass)) *
                                   (1.0 - reach / in_flight));
}

constexpr double kLook2 = 5.5e6;  // bytes per us out of an H200's L2

// Expected time in microseconds in which a block merges what its team has published, beyond the
// first record a thread: that one is in estimate()'s barrier. Each of the team's blocks merges all
// of it, so a wide slab in a large team is slow to finish: bfloat16 of (32, 128, 28, 28) in
// kChannelsLast, 128 channels and 196 blocks, 98 records a thread and 39 MB out of L2.
constexpr double merging(const Problem& p, const Plan& plan, Pass pass) {
  constexpr double kWay = 0.4;  // us: to L2 and back, for as many as are on their way at a time
  // us a record, while the other warps of the SM do the same: some 16 instructions, or 8.
  const double merge = pass == Pass::kForward ? 0.035 : 0.02;
  const std::int64_t published = std::int64_t{plan.team} * slab_channels(p, plan);
  const std::int64_t records = ceil_div(published, plan.threads);
  const std::int64_t ways = ceil_div(records, records_ahead(p.layout, plan.slot_bytes));
  const double waits =
      kWay * static_cast<double>(ways - 1) + merge * static_cast<double>(records - 1);
  const double reads =
      static_cast<double>(plan.blocks() * published * 2 * size_of_statistic(p.dtype)) / kLook2;
  return waits > reads ? waits : reads;
}

// What narrow slots of kChannelsFirst leave of the speed of a copy. Of two bytes: they take 29
// instructions an element forward, 36 back (SASS, sm_90), where an H200 has time for 31 and 46 if
// every one is issued at once; and neighbouring warps both ask L2 for the 32 bytes where their
// slots meet, 0.23 times 32 bytes an element, of which it has some 180 a ns. Of four bytes: half of
// either for a byte, and the 32 bytes that are asked for twice are what shows. Both are guesses.
constexpr double narrow_speed(int slot_bytes) {
  return slot_bytes == 2 ? 0.65 : slot_bytes == 4 ? 0.9 : 1.0;
}

// Expected time in microseconds, to compare plans by. A model of an H200, not a measurement; see
// estimate() for its terms.
constexpr double estimate(const Problem& p, const Plan& plan, const Device& device, Pass pass) {
  constexpr double kCopy = 4.3e6;  // bytes per us, read and written, whole chip
  constexpr double kCopyOfOneSm =
      6.0e4;                          // bytes per us that one SM can draw when the others are idle
  constexpr double kLaunch = 2.0;     // us, fixed cost of a kernel in a graph
  constexpr double kFirstLoad = 0.8;  // us: from the first load of a slab to its data
  constexpr double kReduce = 0.5;     // us: block reduction, last store
  constexpr double kBarrier = 1.5;    // us: publish, arrive, poll, merge one record a thread

  const double bytes = static_cast<double>(p.elements()) * size_of(p.dtype);
  const double busy =
      static_cast<double>(plan.blocks() < device.sm_count ? plan.blocks() : device.sm_count);
  const double chip = kCopy * device.sm_count / 132.0;
  double speed = busy * kCopyOfOneSm < chip ? busy * kCopyOfOneSm : chip;
  // DRAM is filled in half-lines: 32-byte pieces reach half the bandwidth, 64-byte pieces 0.93 of
  // it.
  const int width = by_channel(p.layout) ? 256 : plan.columns * plan.slot_bytes;
  if (p.layout == Layout::kChannelsFirst) speed *= narrow_speed(plan.slot_bytes);
  // A plane's ends lie in 32 bytes that a neighbour's block asks for too: 30 bytes a plane on
  // average.
  if (p.layout == Layout::kUnaligned) {
    const double plane = static_cast<double>(p.spatial) * size_of(p.dtype);
    speed *= plane / (plane + 30.0);
  }
  speed *= width >= 256   ? 0.98
           : width >= 128 ? 0.95
           : width >= 64  ? 0.91
           : width >= 32  ? 0.5
                          : 0.25;

  const double again = static_cast<double>(bytes_reread(p, plan, pass));
  const double missed = static_cast<double>(bytes_missed(p, plan, device, pass));
  const double last_wave =
      static_cast<double>(plan.waves()) * plan.teams / static_cast<double>(plan.slabs);
  const double stream =
      ((tensors_moved(pass) * bytes + missed) / speed + (again - missed) / kLook2) * last_wave;

  if (plan.team == 1 || pass == Pass::kInference) return kLaunch + kFirstLoad + kReduce + stream;
  // A block that waits leaves its SM to the other blocks there, if they belong to another team and
  // have work: with one team, or one wave, nobody has.
  const double waves = static_cast<double>(plan.waves());
  const double cycle = stream / waves;
  const bool alone = plan.teams == 1 || plan.waves() == 1;
  const int overlap = alone ? 1 : blocks_per_sm(p.layout, size_of(p.dtype));
  const double own = cycle / overlap;
  const double meeting = kBarrier + merging(p, plan, pass);
  const double exposed = kFirstLoad + kReduce + meeting + own;
  const double first_wave = cycle > exposed ? cycle : exposed;
  if (plan.prefetch == 0) return kLaunch + waves * first_wave;
  // From the second slab on, the block's own reads run beside the barrier, and only the longer of
  // the two shows; its writes follow the barrier. That is less than `exposed` by kFirstLoad while
  // the barrier is the longer and by `meeting` once the reads are. It saves nothing where the other
  // blocks keep the memory busy all the cycle. As everything here an estimate: no GPU has run it.
  const double reads = own * tensors_read(pass) / tensors_moved(pass);
  const double loading = kFirstLoad + reads;
  const double shows = kReduce + (loading > meeting ? loading : meeting) + (own - reads);
  return kLaunch + first_wave + (waves - 1) * (cycle > shows ? cycle : shows);
}

// Completes a choice of slot, columns, threads and team size. Of `retained` and `prefetch` it keeps
// what the kernels can do and is of use.
constexpr Plan cut(const Problem& p, const Device& device, Pass pass, Plan plan) {
  const std::int64_t total = positions(p, plan);
  const std::int64_t resident = resident_blocks(p, device.sm_count);
  plan.slabs = ceil_div(p.channels, slab_channels(p, plan));
  plan.share = ceil_div(total, plan.team);
  plan.team = static_cast<int>(ceil_div(total, plan.share));  // no block is empty
  plan.rounds = static_cast<int>(ceil_div(plan.share, plan.positions_per_round()));
  if (plan.team == 1) {
    plan.teams = static_cast<int>(
        plan.slabs);  // nobody waits: the hardware's own block scheduler is the best one
  } else {
    const std::int64_t fit = resident / plan.team < plan.slabs ? resident / plan.team : plan.slabs;
    plan.teams = static_cast<int>(
        ceil_div(plan.slabs, ceil_div(plan.slabs, fit)));  // as few waves, evenly filled
  }
  const int most = most_retained(p, device, plan, pass);
  if (plan.retained > most) plan.retained = most;
  if (plan.retained > plan.rounds - 1) plan.retained = plan.rounds - 1;
  if (!can_prefetch(p, device, plan)) plan.prefetch = 0;
  return plan;
}

constexpr int power_of_two_from(std::int64_t n, int least, int most) {
  int power = least;
  while (power < n && power < most) power *= 2;
  return power;
}

// The fewest threads that hold `total` positions in their slots; each channel of the slab needs a
// thread to finish it.
constexpr int fewest_threads(const Problem& p, const Plan& plan, std::int64_t total) {
  const int channels = slab_channels(p, plan);
  return power_of_two_from(ceil_div(total, plan.slots) * plan.columns,
                           channels < kMinThreads ? kMinThreads : channels, kMaxThreads);
}

// The best team for one width of slab. Small teams first: a barrier is paid only for data that does
// not fit one block, or to give idle SMs work.
constexpr Plan plan_width(const Problem& p, const Device& device, Pass pass, int slot_bytes,
                          int columns) {
  const std::int64_t resident = resident_blocks(p, device.sm_count);

  Plan plan;
  plan.slot_bytes = slot_bytes;
  plan.columns = columns;
  plan.slots = slots_per_thread(pass, slot_bytes);
  plan.threads = kMaxThreads;
  plan.team = 1;
  plan.retained = most_retained(p, device, plan, pass);
  const std::int64_t total = positions(p, plan);
  const std::int64_t slabs = ceil_div(p.channels, slab_channels(p, plan));

  if (total <= plan.positions_per_round()) {
    // The slab fits one block. As few threads as hold it, more where the chip would stand idle.
    plan.threads = fewest_threads(p, plan, total);
    while (plan.threads < kMaxThreads &&
           slabs * plan.threads < std::int64_t{device.sm_count} * 1024 &&
           total * columns > plan.threads) {
      plan.threads *= 2;
    }
  }

  Plan best = cut(p, device, pass, plan);
  double best_time = estimate(p, best, device, pass);
  // Teams that hold the whole slab in registers, or in registers and shared memory; that have all
  // slabs in work at once; of which there are two, so that one loads while one waits; and the whole
  // chip, which holds most of a slab but waits for itself.
  const std::int64_t fills = ceil_div(total, plan.positions_per_round());
  const std::int64_t retains = ceil_div(fills, 1 + plan.retained);
  const std::int64_t spreads = resident / slabs;
  const std::int64_t most = slabs > 1 && resident >= 4 ? resident / 2 : resident;
  const std::int64_t useful = ceil_div(total, plan.positions_per_pass());
  for (const std::int64_t wanted : {fills, retains, spreads, most, resident}) {
    std::int64_t team = wanted < most || wanted == resident ? wanted : most;
    team = team < useful ? team : useful;
    if (team < 2 || team == plan.team) continue;
    plan.team = static_cast<int>(team);
    plan.prefetch = 1;
    Plan candidate = cut(p, device, pass, plan);
    const int can = candidate.prefetch;
    for (candidate.prefetch = 0; candidate.prefetch <= can; ++candidate.prefetch) {
      const double time = estimate(p, candidate, device, pass);
      // More shared memory has to promise 3%: the way through it is not in the model.
      const bool direct = dynamic_shared_bytes(candidate, pass) <= dynamic_shared_bytes(best, pass);
      if (time < best_time * (direct ? 1.0 : 0.97)) {
        best = candidate;
        best_time = time;
      }
    }
  }
  return best;
}

// Whether the problem can be cut into bundles, and is worth it: slots of 8 bytes are good enough,
// and of a full block's threads a pass may leave a quarter idle.
constexpr bool can_bundle(const Problem& p) {
  if (p.layout != Layout::kChannelsFirst || size_of(p.dtype) > 4 || widest_slot(p) > 4)
    return false;
  const int lanes = 16 / size_of(p.dtype);
  return p.alignment % 16 == 0 && p.channels % lanes == 0 && lanes <= p.spatial &&
         p.spatial <= kMaxThreads && kMaxThreads / p.spatial * p.spatial >= kMaxThreads * 3 / 4;
}

// Whether its channels can go one by one in slots of 16 bytes all the same. Those of all images
// then begin in the same lane, and the last slot ends where the tensor does. It takes some 13 and
// 19 instructions an element, forward and back, where slots of two bytes take 29 and 36 (SASS,
// sm_90). Of two-byte elements only: what slots of four bytes lose is not worth a kernel
// (narrow_speed).
constexpr bool can_unalign(const Problem& p) {
  return p.layout == Layout::kChannelsFirst && size_of(p.dtype) == 2 && widest_slot(p) <= 4 &&
         p.alignment % 16 == 0 && p.channels % 8 == 0 && kLeastUnaligned <= p.spatial &&
         p.spatial <= kMostUnaligned;
}

// Bundles have to leave blocks for three quarters of the chip: channel by channel there are more of
// those to go round.
constexpr bool fills(const Device& device, const Plan& bundles) {
  return bundles.blocks() * 4 >= std::int64_t{device.sm_count} * 3;
}

// The best of the ways to take planes, of which make(problem, slot bytes, columns) plans one. Wide
// slots in planes that they do not tile have to promise to be `gain` times as fast as narrow ones,
// since how much slower those are is an estimate too, and 1.05 times as fast as bundles, which read
// and write longer pieces of memory.
template <typename Make>
constexpr Plan plan_planes(const Problem& p, const Device& device, Pass pass, double gain,
                           Make make) {
  Plan best = make(p, widest_slot(p), 1);
  if (!can_bundle(p) && !can_unalign(p)) return best;
  double least = estimate(p, best, device, pass) / gain;
  Problem q = p;
  if (can_bundle(p)) {
    q.layout = Layout::kBundles;
    const Plan bundles = make(q, 16, static_cast<int>(p.spatial));
    const double time = estimate(q, bundles, device, pass);
    if (time < least && fills(device, bundles)) {
      best = bundles;
      least = time / 1.05;
    }
  }
  if (can_unalign(p)) {
    q.layout = Layout::kUnaligned;
    const Plan unaligned = make(q, 16, 1);
    if (estimate(q, unaligned, device, pass) < least) best = unaligned;
  }
  return best;
}

constexpr Plan plan_team(const Problem& p, const Device& device, Pass pass) {
  if (p.layout == Layout::kChannelsFirst) {
    return plan_planes(p, device, pass, 1.1, [&](const Problem& q, int slot_bytes, int columns) {
      return plan_width(q, device, pass, slot_bytes, columns);
    });
  }

  const int slot_bytes = widest_slot(p);
  const int lanes = slot_bytes / size_of(p.dtype);
  Plan best;
  double best_time = 0.0;
  for (int columns = 1; columns <= kWarp && columns * lanes <= kMaxSlabChannels; columns *= 2) {
    const Plan candidate = plan_width(p, device, pass, slot_bytes, columns);
    const double time = estimate(p, candidate, device, pass);
    if (best.team == 0 || time < best_time) {
      best = candidate;
      best_time = time;
    }
    if (std::int64_t{columns} * lanes >= p.channels) break;
  }
  return best;
}

constexpr Plan plan_forward(const Problem& p, const Device& device) {
  return plan_team(p, device, Pass::kForward);
}
constexpr Plan plan_backward(const Problem& p, const Device& device) {
  return plan_team(p, device, Pass::kBackward);
}

// No statistics, so no team has to be resident at once: one round a block, as many blocks as that
// takes.
constexpr Plan plan_blocks(const Problem& p, Pass slots, int slot_bytes, int columns) {
  Plan plan;
  plan.slot_bytes = slot_bytes;
  plan.columns = columns;
  plan.slots = slots_per_thread(slots, slot_bytes);
  plan.threads = kMaxThreads;
  const std::int64_t total = positions(p, plan);
  plan.threads = fewest_threads(p, plan, total);
  plan.slabs = ceil_div(p.channels, slab_channels(p, plan));
  plan.teams = static_cast<int>(plan.slabs);
  plan.team = static_cast<int>(ceil_div(total, plan.positions_per_round()));
  plan.share = plan.positions_per_round();
  plan.rounds = 1;
  return plan;
}

constexpr Plan plan_elementwise(const Problem& p, const Device& device, Pass slots) {
  if (p.layout == Layout::kChannelsFirst) {
    return plan_planes(p, device, Pass::kInference, 1.05,
                       [&](const Problem& q, int slot_bytes, int columns) {
                         return plan_blocks(q, slots, slot_bytes, columns);
                       });
  }
  const int slot_bytes = widest_slot(p);
  const int lanes = slot_bytes / size_of(p.dtype);
  int columns = 1;
  while (columns < kWarp && columns * lanes < p.channels && columns * 2 * lanes <= kMaxSlabChannels)
    columns *= 2;
  return plan_blocks(p, slots, slot_bytes, columns);
}

constexpr Plan plan_inference(const Problem& p, const Device& device) {
  return plan_elementwise(p, device, Pass::kInference);
}
// Two tensors to hold, as in the whole backward pass.
constexpr Plan plan_backward_project(const Problem& p, const Device& device) {
  return plan_elementwise(p, device, Pass::kBackward);
}

}  // namespace brn
