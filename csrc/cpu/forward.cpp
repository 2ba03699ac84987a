// Training-mode forward pass: statistics, r and d, moving averages and y.
//
//   reduce   reads x
//   write    reads x again, from the cache as far as the slab fits it, and writes y
//
// 1 read + 1 write is the floor; a slab larger than the caches is read from memory twice.
#include "pages.h"
#include "reductions.h"
#include "slabs.h"

#include <algorithm>
#include <atomic>
#include <vector>

namespace brn::cpu {
namespace {

template <typename T>
struct Forward : MomentsReduction<T> {
  using Real = RealOf<T>;
  using Reduction = MomentsReduction<T>;
  using Reduction::problem, Reduction::x;
  enum Fact { kPivot = Reduction::kPivot, kCentre, kScale, kShift, kFacts };

  const ForwardParams& params;
  const Step<Real> step;
  std::atomic<bool>& finite;

  void finish(const Part& slab, const Table<Real>& total, const Table<Real>& facts) const {
    if (!per_channel<Real>().step(slab, problem, params, step, facts[kPivot],
                                  Reduction::rows_of(total),
                                  {facts[kCentre], facts[kScale], facts[kShift]})) {
      finite.store(false, std::memory_order_relaxed);
    }
    for (const Fact row : {kCentre, kScale, kShift}) sweeps<T>().arrange(slab, facts[row]);
  }

  void write(const Part& part, const Table<Real>& facts) const {
    sweeps<T>().normalise(part, x, {facts[kCentre], facts[kScale], facts[kShift]},
                          static_cast<T*>(params.y));
  }
};

template <typename T>
void forward_of(const Problem& p, const ForwardParams& params, const Parallel& parallel) {
  using Real = RealOf<T>;
  const auto channels = static_cast<std::size_t>(p.channels);
  if (p.reduced() == 0) {
    std::fill_n(static_cast<Real*>(params.stats), kStatRows * channels, Real(0));
    return;
  }
  const std::int64_t step = params.num_batches_tracked != nullptr ? *params.num_batches_tracked : 0;
  Real* running_mean = static_cast<Real*>(params.running_mean);
  Real* running_std = static_cast<Real*>(params.running_std);

  // Whether the batch is finite is known after its last channel: the averages wait until then.
  const bool wait = params.skip_nonfinite && running_mean != nullptr;
  std::vector<Real> waiting(wait ? 2 * channels : 0);
  std::atomic<bool> finite{true};
  prefer_huge_pages(params.y, p.elements() * size_of(p.dtype));
  run(cut(p, 1), parallel,
      Forward<T>{
          {p, static_cast<const T*>(params.x)},
          params,
          {limits_of<Real>(params, step), averaging_weight<Real>(params.momentum, step),
           wait ? waiting.data() : running_mean, wait ? waiting.data() + channels : running_std},
          finite});

  if (params.skip_nonfinite && !finite) return;
  if (wait) {
    std::copy_n(waiting.data(), channels, running_mean);
    std::copy_n(waiting.data() + channels, channels, running_std);
  }
  if (params.num_batches_tracked != nullptr) *params.num_batches_tracked = step + 1;
}

}  // namespace

void forward(const Problem& p, const ForwardParams& params, const Parallel& parallel) {
  with_element(p.dtype, [&](auto t) { forward_of<decltype(t)>(p, params, parallel); });
}

}  // namespace brn::cpu
