// Plans that have been made before: a model asks for the same ones at every step.
//
// Making one takes the host 0.05 to 0.4 us in kChannelsFirst, two to four times as long where there
// is a choice of slots, and 0.1 to 2.8 us in kChannelsLast, where it compares the teams of up to
// six widths of slab; finding it 0.014 (Emerald Rapids, all of it in the caches).
#pragma once

#include "../core/plan.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace brn::binding {

// Of one pass and one device. A problem has one place; of two that share it the later one stays.
class Plans {
 public:
  using Planner = Plan (*)(const Problem&, const Device&);

  explicit Plans(Planner make) : make_(make) {}

  // What the planner says. `device` is the same in every call.
  Plan of(const Problem& p, const Device& device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Known& known = known_[place(p)];
    if (!known.made || !(known.problem == p)) known = {true, p, make_(p, device)};
    return known.plan;
  }

  Planner planner() const { return make_; }

 private:
  struct Known {
    bool made = false;
    Problem problem;
    Plan plan;
  };
  static constexpr int kBits = 8;

  static std::size_t place(const Problem& p) {
    const std::uint64_t rest = static_cast<std::uint64_t>(p.layout) << 16 |
                               static_cast<std::uint64_t>(p.dtype) << 8 |
                               static_cast<std::uint64_t>(p.alignment);
    std::uint64_t hash = 0;
    for (const std::uint64_t field :
         {static_cast<std::uint64_t>(p.batch), static_cast<std::uint64_t>(p.channels),
          static_cast<std::uint64_t>(p.spatial), rest})
      hash = (hash ^ field) * 0x9e3779b97f4a7c15u;  // of Fibonacci hashing: 2^64 / golden ratio
    return static_cast<std::size_t>(hash >> (64 - kBits));
  }

  const Planner make_;
  std::mutex mutex_;
  std::array<Known, std::size_t{1} << kBits> known_;
};

}  // namespace brn::binding
