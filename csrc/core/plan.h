// The choice of a plan: pure functions of sizes, so that the whole decision can be read from Python
// and tested for every shape on a machine without a GPU. geometry.h says what a plan is, cost.h
// what one is expected to take.
#pragma once

#include "cost.h"
#include "geometry.h"

#include <cstdint>

namespace brn {

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
