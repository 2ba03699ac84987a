// What a plan is expected to cost: bytes that are read twice, and a time to compare plans by. A
// model of an H200, which no GPU has confirmed: a launch does not depend on it, the choice of one
// does.
#pragma once

#include "geometry.h"

#include <cstdint>

namespace brn {

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

}  // namespace brn
