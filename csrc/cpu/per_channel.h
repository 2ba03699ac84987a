// What is done once a channel of a slab: Algorithm 1, the gradients, and what parts add up to.
#pragma once

#include "channel.h"
#include "isa.h"

#include <cstdint>

namespace brn::cpu {
namespace {

template <typename Real>
struct ChannelEntries {
  using Values = Chunk<Real>;

  // merge() of math.h, with a mean in two Reals: parts may be many, and in one each would round it
  // once more. (32, 2048, 7, 7) float32 in kChannelsLast, 49 parts, dy of mean 3, error of dweight
  // in last places (the parity harness's measure): 6 so, 37 in one, plain PyTorch 28.
  static void merge_moments(const Part& part, const MomentRows<Real>& more,
                            const MomentRows<Real>& total) {
    const Real before = static_cast<Real>(part.begin);
    const Real weight = static_cast<Real>(part.end - part.begin) / static_cast<Real>(part.end);
    for (std::int64_t w = 0; w < part.width; ++w) {
      Real& mean = total.mean[w];
      Real& error = total.mean_error[w];
      const Real delta = (more.mean[w] - mean) - error;
      const TwoSum<Real> moved = two_sum(mean, delta * weight);
      mean = moved.sum;
      error += moved.error;
      total.m2[w] += more.m2[w] + delta * delta * before * weight;
    }
  }

  static void add(std::int64_t width, const Real* more, const Real* more_error, Real* sum,
                  Real* error) {
    for (std::int64_t w = 0; w < width; ++w) {
      const TwoSum<Real> both = two_sum(sum[w], more[w]);
      error[w] += more_error[w] + both.error;
      sum[w] = both.sum;
    }
  }
  static void merge_sums(const Part& part, const SumRows<Real>& more, const SumRows<Real>& total) {
    add(part.width, more.g, more.g_error, total.g, total.g_error);
    add(part.width, more.gx, more.gx_error, total.gx, total.gx_error);
  }

  static bool step(const Part& slab, const StepConstants<Real>& constants,
                   const StepRows<Real>& rows) {
    bool finite = true;
    for_each_chunk(slab.width, [&](std::int64_t w, std::int64_t n) {
      const Values mean = Values::load(rows.moments.mean + w, n);
      const Values mean_error = Values::load(rows.moments.mean_error + w, n);
      const Values m2 = Values::load(rows.moments.m2 + w, n);
      const Values pivot = Values::load(rows.pivot + w, n);
      const Values weight = Values::load(from(rows.weight, w), n, Real(1));
      const Values bias = Values::load(from(rows.bias, w), n, Real(0));
      const Values running_mean = Values::load(from(rows.running_mean, w), n, Real(0));
      const Values running_std = Values::load(from(rows.running_std, w), n, Real(1));
      StatsChunk<Real> stats;
      Values centre, scale, shift, next_mean, next_std;
      Real poison = 0;  // NaN after any m2 that is inf or NaN
      for (std::int64_t k = 0; k < n; ++k) {
        const Moments<Real> moments{constants.count, mean[k], m2[k]};
        const Running<Real> running{running_mean[k], running_std[k]};
        const ChannelStats<Real> s = channel_stats(moments, pivot[k], constants.epsilon, running,
                                                   constants.limits, mean_error[k]);
        const Affine<Real> affine = training_affine(s, weight[k], bias[k]);
        const Running<Real> next =
            moved(running, moments, pivot[k], constants.epsilon, constants.momentum);
        stats.set(k, s);
        centre[k] = affine.centre;
        scale[k] = affine.scale;
        shift[k] = affine.shift;
        next_mean[k] = next.mean;
        next_std[k] = next.std;
      }
      for (std::int64_t k = 0; k < n; ++k) poison += m2[k] * Real(0);
      stats.store(rows.stats + w, rows.channels, n);
      centre.store(rows.affine.centre + w, n);
      scale.store(rows.affine.scale + w, n);
      shift.store(rows.affine.shift + w, n);
      if (rows.moved_mean != nullptr) next_mean.store(rows.moved_mean + w, n);
      if (rows.moved_std != nullptr) next_std.store(rows.moved_std + w, n);
      if (poison != Real(0)) finite = false;
    });
    return finite;
  }

  static void gradients(const Part& slab, Real count, const GradientRows<Real>& rows) {
    const bool training = rows.stats.values != nullptr;
    for_each_chunk(slab.width, [&](std::int64_t w, std::int64_t n) {
      const StatsChunk<Real> stats = StatsChunk<Real>::load(rows.stats, w, n);
      const Values weight = Values::load(from(rows.weight, w), n, Real(1));
      const SumsChunk<Real> sums = SumsChunk<Real>::load(rows.sums, rows.residue, w, n);
      Values dweight, dbias, mean_g, slope, scale;
      for (std::int64_t k = 0; k < n; ++k) {
        const Sums<Real> both = sums[k];
        const Projection<Real> p = projection(both, count, stats[k], weight[k], training);
        dweight[k] = weight_gradient(both, stats[k]);
        dbias[k] = both.g;
        mean_g[k] = p.mean_g;
        slope[k] = p.slope;
        scale[k] = p.scale;
      }
      dweight.store(rows.dweight + w, n);
      dbias.store(rows.dbias + w, n);
      mean_g.store(rows.projection.mean_g + w, n);
      slope.store(rows.projection.slope + w, n);
      scale.store(rows.projection.scale + w, n);
    });
  }

  static void affine(const Part& slab, const StatRows<Real>& rows, const Real* weights,
                     const Real* biases, const Affine<Real*>& out) {
    for_each_chunk(slab.width, [&](std::int64_t w, std::int64_t n) {
      const Values weight = Values::load(from(weights, w), n, Real(1));
      const Values bias = Values::load(from(biases, w), n, Real(0));
      Values centre, scale, shift;
      const auto set = [&](std::int64_t k, Affine<Real> a) {
        centre[k] = a.centre;
        scale[k] = a.scale;
        shift[k] = a.shift;
      };
      if (rows.values != nullptr) {
        const auto stats = StatsChunk<Real>::load(rows, w, n);
        for (std::int64_t k = 0; k < n; ++k) set(k, training_affine(stats[k], weight[k], bias[k]));
      } else {
        const Values mean = Values::load(rows.running_mean + w, n);
        const Values std = Values::load(rows.running_std + w, n);
        for (std::int64_t k = 0; k < n; ++k) {
          set(k, inference_affine<Real>({mean[k], std[k]}, weight[k], bias[k]));
        }
      }
      centre.store(out.centre + w, n);
      scale.store(out.scale + w, n);
      shift.store(out.shift + w, n);
    });
  }

  static constexpr PerChannel<Real> per_channel() {
    return {merge_moments, merge_sums, step, gradients, affine};
  }
};

}  // namespace
}  // namespace brn::cpu
