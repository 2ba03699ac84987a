// Training-mode forward pass: statistics, r and d, moving averages and y.
//
//   reduce   reads x
//   write    reads x again, from the cache as far as the slab fits it, and writes y
//
// 1 read + 1 write is the floor; a slab larger than the caches is read from memory twice.
#include "channel.h"
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
  using Reduction::kM2, Reduction::kMean, Reduction::kMeanError, Reduction::problem, Reduction::x;
  enum Fact { kPivot = Reduction::kPivot, kCentre, kScale, kShift, kFacts };

  const ForwardParams& params;
  const Limits<Real> limits;
  const Real momentum;
  Real* const moved_mean;  // [C] the moving averages after this batch; null: there are none
  Real* const moved_std;
  std::atomic<bool>& finite;

  // Without moving averages the limits are 1 and 0, and what stands in for them cancels out.
  void finish(const Part& slab, const Table<Real>& total, const Table<Real>& facts) const {
    using Values = Chunk<Real>;
    const Real count = static_cast<Real>(problem.reduced());
    const Real epsilon = static_cast<Real>(params.epsilon);
    for_each_chunk(slab.width, [&](std::int64_t w, std::int64_t n) {
      const std::int64_t c = slab.channel + w;
      const Values mean = Values::load(total[kMean] + w, n);
      const Values mean_error = Values::load(total[kMeanError] + w, n);
      const Values m2 = Values::load(total[kM2] + w, n);
      const Values pivot = Values::load(facts[kPivot] + w, n);
      const Values weight = Values::load(at<Real>(params.weight, c), n, Real(1));
      const Values bias = Values::load(at<Real>(params.bias, c), n, Real(0));
      const Values running_mean = Values::load(at<Real>(params.running_mean, c), n, Real(0));
      const Values running_std = Values::load(at<Real>(params.running_std, c), n, Real(1));
      StatsChunk<Real> stats;
      Values centre, scale, shift, next_mean, next_std;
      Real poison = 0;  // NaN after any m2 that is inf or NaN
      for (std::int64_t k = 0; k < n; ++k) {
        const Moments<Real> moments{count, mean[k], m2[k]};
        const Running<Real> running{running_mean[k], running_std[k]};
        const ChannelStats<Real> s =
            channel_stats(moments, pivot[k], epsilon, running, limits, mean_error[k]);
        const Affine<Real> affine = training_affine(s, weight[k], bias[k]);
        const Running<Real> next = moved(running, moments, pivot[k], epsilon, momentum);
        stats.set(k, s);
        centre[k] = affine.centre;
        scale[k] = affine.scale;
        shift[k] = affine.shift;
        next_mean[k] = next.mean;
        next_std[k] = next.std;
      }
      for (std::int64_t k = 0; k < n; ++k) poison += m2[k] * Real(0);
      stats.store(at<Real>(params.stats, c), problem.channels, n);
      centre.store(facts[kCentre] + w, n);
      scale.store(facts[kScale] + w, n);
      shift.store(facts[kShift] + w, n);
      if (moved_mean != nullptr) next_mean.store(moved_mean + c, n);
      if (moved_std != nullptr) next_std.store(moved_std + c, n);
      if (poison != Real(0)) finite.store(false, std::memory_order_relaxed);
    });
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
      Forward<T>{{p, static_cast<const T*>(params.x)},
                 params,
                 limits_of<Real>(params, step),
                 averaging_weight<Real>(params.momentum, step),
                 wait ? waiting.data() : running_mean,
                 wait ? waiting.data() + channels : running_std,
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
