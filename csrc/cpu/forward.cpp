// Training-mode forward pass: statistics, r and d, moving averages and y.
//
//   reduce   reads x
//   write    reads x again, from the cache as far as the slab fits it, and writes y
//
// 1 read + 1 write of x is the floor; a slab larger than the caches is read from memory twice.
#include "channel.h"
#include "pages.h"
#include "slabs.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

namespace brn::cpu {
namespace {

template <typename T>
struct Forward {
  using Real = RealOf<T>;
  enum Fact { kPivot, kOffset, kScale, kShift, kFacts };
  enum Row { kMean, kM2, kPartials };

  const Problem& problem;
  const ForwardParams& params;
  const Limits<Real> limits;
  const Real momentum;
  const Real epsilon;
  Real* const m2;  // [C] kept until the batch is known to be finite; null: the averages move at once
  std::atomic<bool>& finite;

  const T* x() const { return static_cast<const T*>(params.x); }

  void begin(const Part& slab, const Table<Real>& facts) const { sweeps<T>().pivots(slab, x(), facts[kPivot]); }

  void reduce(const Part& part, const Table<Real>& facts, const Table<Real>& moments) const {
    sweeps<T>().moments(part, x(), facts[kPivot], moments[kMean], moments[kM2]);
  }

  void merge(const Part& part, const Table<Real>& moments, const Table<Real>& total) const {
    const Real before = static_cast<Real>(part.begin);
    const Real count = static_cast<Real>(part.end - part.begin);
    for (std::int64_t w = 0; w < part.width; ++w) {
      const Moments<Real> merged = brn::merge<Real>({before, total[kMean][w], total[kM2][w]},
                                                    {count, moments[kMean][w], moments[kM2][w]});
      total[kMean][w] = merged.mean;
      total[kM2][w] = merged.m2;
    }
  }

  void finish(const Part& slab, const Table<Real>& total, const Table<Real>& facts) const {
    for (std::int64_t w = 0; w < slab.width; ++w) {
      const std::int64_t c = slab.channel + w;
      const Moments<Real> moments{static_cast<Real>(problem.reduced()), total[kMean][w], total[kM2][w]};
      const ChannelStats<Real> stats = stats_of(moments, facts[kPivot][w], c);
      store_stats(params.stats, problem.channels, c, stats);
      if (m2 == nullptr) {
        move_averages(moments, stats.pivot, c);
      } else {
        m2[c] = moments.m2;
        if (!std::isfinite(moments.m2)) finite.store(false, std::memory_order_relaxed);
      }
      const Affine<Real> affine = training_affine(stats, value_or(params.weight, c, Real(1)), value_or(params.bias, c, Real(0)));
      facts[kOffset][w] = affine.offset;
      facts[kScale][w] = affine.scale;
      facts[kShift][w] = affine.shift;
    }
  }

  void write(const Part& part, const Table<Real>& facts) const {
    sweeps<T>().normalise(part, x(), {facts[kPivot], facts[kOffset], facts[kScale], facts[kShift]}, static_cast<T*>(params.y));
  }

  ChannelStats<Real> stats_of(Moments<Real> moments, Real pivot, std::int64_t c) const {
    if (params.running_mean == nullptr) {
      return {pivot, moments.mean, reciprocal(batch_std(moments, epsilon)), Real(1), Real(0)};
    }
    return channel_stats(moments, pivot, epsilon, load_running<Real>(params.running_mean, params.running_std, c), limits);
  }

  void move_averages(Moments<Real> moments, Real pivot, std::int64_t c) const {
    if (params.running_mean == nullptr) return;
    const Running<Real> before = load_running<Real>(params.running_mean, params.running_std, c);
    const Running<Real> after = moved(before, moments, pivot, epsilon, momentum);
    static_cast<Real*>(params.running_mean)[c] = after.mean;
    static_cast<Real*>(params.running_std)[c] = after.std;
  }

  // After every slab is finished.
  void move_averages_later() const {
    const Real* stats = static_cast<const Real*>(params.stats);
    for (std::int64_t c = 0; c < problem.channels; ++c) {
      const Real pivot = stats[c];
      const Real mean = stats[problem.channels + c];
      move_averages({static_cast<Real>(problem.reduced()), mean, m2[c]}, pivot, c);
    }
  }
};

template <typename Real>
Limits<Real> limits_of(const ForwardParams& params, std::int64_t step) {
  const double* s = params.schedule;
  if (s != nullptr) return limits_at<Real>({s[0], s[1], s[2], s[3], s[4]}, step);
  return {static_cast<Real>(params.limits.r_max), static_cast<Real>(params.limits.d_max)};
}

template <typename T>
void forward_of(const Problem& p, const ForwardParams& params, const Parallel& parallel) {
  using Real = RealOf<T>;
  if (p.reduced() == 0) {
    std::fill_n(static_cast<Real*>(params.stats), kStatRows * p.channels, Real(0));
    return;
  }
  const std::int64_t step = params.num_batches_tracked != nullptr ? *params.num_batches_tracked : 0;
  std::vector<Real> m2(params.skip_nonfinite ? static_cast<std::size_t>(p.channels) : 0);
  std::atomic<bool> finite{true};
  const Forward<T> pass{p,
                        params,
                        limits_of<Real>(params, step),
                        averaging_weight<Real>(params.momentum, step),
                        static_cast<Real>(params.epsilon),
                        params.skip_nonfinite ? m2.data() : nullptr,
                        finite};
  prefer_huge_pages(params.y, p.elements() * size_of(p.dtype));
  run(cut(p), parallel, pass);
  if (!finite) return;
  if (params.skip_nonfinite) pass.move_averages_later();
  if (params.num_batches_tracked != nullptr) *params.num_batches_tracked = step + 1;
}

}  // namespace

void forward(const Problem& p, const ForwardParams& params, const Parallel& parallel) {
  with_element(p.dtype, [&](auto t) { forward_of<decltype(t)>(p, params, parallel); });
}

}  // namespace brn::cpu
