// The moments of all ranks become one batch's, and what a training step makes of them: statistics,
// r and d, moving averages and step counter.
#include "../core/ranks.h"
#include "element.h"
#include "launch.h"

#include <algorithm>
#include <cmath>

namespace brn::cpu {
namespace {

template <typename Real>
bool all_finite(const MergeParams& params) {
  for (std::int64_t c = 0; c < params.channels; ++c) {
    const Moments<Real> m =
        merge_ranks<Real>(params.gathered, params.ranks, params.channels, c).moments;
    if (!(std::isfinite(m.mean) && std::isfinite(m.m2))) return false;
  }
  return true;
}

template <typename Real>
void merge_of(const MergeParams& params) {
  const std::int64_t channels = params.channels;
  const Total total = total_of(params.gathered, params.ranks, channels);
  params.total[0] = total.count;
  params.total[1] = total.backward;
  Real* stats = static_cast<Real*>(params.stats);
  if (total.count == 0.0) {
    std::fill_n(stats, kStatRows * channels, Real(0));
    return;
  }

  const std::int64_t step = params.num_batches_tracked != nullptr ? *params.num_batches_tracked : 0;
  const Limits<Real> limits = limits_of<Real>(params, step);
  const Real momentum = averaging_weight<Real>(params.momentum, step);
  const Real epsilon = static_cast<Real>(params.epsilon);
  const bool moves = !params.skip_nonfinite || all_finite<Real>(params);
  Real* running_mean = static_cast<Real*>(params.running_mean);
  Real* running_std = static_cast<Real*>(params.running_std);
  for (std::int64_t c = 0; c < channels; ++c) {
    const PivotedMoments<Real> all = merge_ranks<Real>(params.gathered, params.ranks, channels, c);
    const Running<Real> running = running_mean != nullptr
                                      ? Running<Real>{running_mean[c], running_std[c]}
                                      : Running<Real>{Real(0), Real(1)};
    const ChannelStats<Real> s = channel_stats(all.moments, all.pivot, epsilon, running, limits);
    stats[0 * channels + c] = s.centre;
    stats[1 * channels + c] = s.residue;
    stats[2 * channels + c] = s.inv_std;
    stats[3 * channels + c] = s.r;
    stats[4 * channels + c] = s.d;
    if (running_mean != nullptr && moves) {
      const Running<Real> next = moved(running, all.moments, all.pivot, epsilon, momentum);
      running_mean[c] = next.mean;
      running_std[c] = next.std;
    }
  }
  if (params.num_batches_tracked != nullptr && moves) *params.num_batches_tracked = step + 1;
}

}  // namespace

void merge(const MergeParams& params) {
  with_element(params.dtype, [&](auto t) { merge_of<RealOf<decltype(t)>>(params); });
}

}  // namespace brn::cpu
