// What is done once a channel of a slab: what parts add up to, Algorithm 1, and the gradients.
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

  static bool step(const Part& slab, const Problem& p, const ForwardParams& params,
                   const Step<Real>& by, const Real* pivots, const MomentRows<Real>& rows,
                   const Affine<Real*>& out) {
    const Real count = static_cast<Real>(p.reduced());
    const Real epsilon = static_cast<Real>(params.epsilon);
    bool finite = true;
    for_each_chunk(slab.width, [&](std::int64_t w, std::int64_t n) {
      const std::int64_t c = slab.channel + w;
      const Values mean = Values::load(rows.mean + w, n);
      const Values mean_error = Values::load(rows.mean_error + w, n);
      const Values m2 = Values::load(rows.m2 + w, n);
      const Values pivot = Values::load(pivots + w, n);
      const Values weight = Values::load(at<Real>(params.weight, c), n, Real(1));
      const Values bias = Values::load(at<Real>(params.bias, c), n, Real(0));
      // Without moving averages the limits are 1 and 0, and these cancel out.
      const Values running_mean = Values::load(at<Real>(params.running_mean, c), n, Real(0));
      const Values running_std = Values::load(at<Real>(params.running_std, c), n, Real(1));
      StatsChunk<Real> stats;
      Values centre, scale, shift, next_mean, next_std;
      Real poison = 0;  // NaN after any m2 that is inf or NaN
      for (std::int64_t k = 0; k < n; ++k) {
        const Moments<Real> moments{count, mean[k], m2[k]};
        const Running<Real> running{running_mean[k], running_std[k]};
        const ChannelStats<Real> s =
            channel_stats(moments, pivot[k], epsilon, running, by.limits, mean_error[k]);
        const Affine<Real> affine = training_affine(s, weight[k], bias[k]);
        const Running<Real> next = moved(running, moments, pivot[k], epsilon, by.momentum);
        stats.set(k, s);
        centre[k] = affine.centre;
        scale[k] = affine.scale;
        shift[k] = affine.shift;
        next_mean[k] = next.mean;
        next_std[k] = next.std;
      }
      for (std::int64_t k = 0; k < n; ++k) poison += m2[k] * Real(0);
      stats.store(at<Real>(params.stats, c), p.channels, n);
      centre.store(out.centre + w, n);
      scale.store(out.scale + w, n);
      shift.store(out.shift + w, n);
      if (by.moved_mean != nullptr) next_mean.store(by.moved_mean + c, n);
      if (by.moved_std != nullptr) next_std.store(by.moved_std + c, n);
      if (poison != Real(0)) finite = false;
    });
    return finite;
  }

  static void affine(const Part& slab, const Problem& p, const InferenceParams& params,
                     const Affine<Real*>& out) {
    for_each_chunk(slab.width, [&](std::int64_t w, std::int64_t n) {
      const std::int64_t c = slab.channel + w;
      const Values weight = Values::load(at<Real>(params.weight, c), n, Real(1));
      const Values bias = Values::load(at<Real>(params.bias, c), n, Real(0));
      Values centre, scale, shift;
      const auto set = [&](std::int64_t k, Affine<Real> a) {
        centre[k] = a.centre;
        scale[k] = a.scale;
        shift[k] = a.shift;
      };
      if (params.stats != nullptr) {
        const auto stats = StatsChunk<Real>::load(at<Real>(params.stats, c), p.channels, n);
        for (std::int64_t k = 0; k < n; ++k) set(k, training_affine(stats[k], weight[k], bias[k]));
      } else {
        const Values mean = Values::load(at<Real>(params.running_mean, c), n);
        const Values std = Values::load(at<Real>(params.running_std, c), n);
        for (std::int64_t k = 0; k < n; ++k) {
          set(k, inference_affine<Real>({mean[k], std[k]}, weight[k], bias[k]));
        }
      }
      centre.store(out.centre + w, n);
      scale.store(out.scale + w, n);
      shift.store(out.shift + w, n);
    });
  }

  static void gradients(const Part& slab, const Problem& p, const BackwardParams& params,
                        const SumRows<Real>& rows, const Real* residue,
                        const Projection<Real*>& out) {
    const Real count = static_cast<Real>(p.reduced());
    const bool training = params.stats != nullptr;
    for_each_chunk(slab.width, [&](std::int64_t w, std::int64_t n) {
      const std::int64_t c = slab.channel + w;
      const auto stats = StatsChunk<Real>::of(params, p.channels, c, n);
      const Values weight = Values::load(at<Real>(params.weight, c), n, Real(1));
      const SumsChunk<Real> sums = SumsChunk<Real>::load(rows, residue, w, n);
      Values dweight, dbias, mean_g, slope, scale;
      for (std::int64_t k = 0; k < n; ++k) {
        const Sums<Real> both = sums[k];
        const Projection<Real> by = brn::projection(both, count, stats[k], weight[k], training);
        dweight[k] = weight_gradient(both, stats[k]);
        dbias[k] = both.g;
        mean_g[k] = by.mean_g;
        slope[k] = by.slope;
        scale[k] = by.scale;
      }
      dweight.store(at<Real>(params.dweight, c), n);
      dbias.store(at<Real>(params.dbias, c), n);
      mean_g.store(out.mean_g + w, n);
      slope.store(out.slope + w, n);
      scale.store(out.scale + w, n);
    });
  }

  static void projection(const Part& slab, const Problem& p, const BackwardProjectParams& params,
                         Real* centre, const Projection<Real*>& out) {
    const Real count = static_cast<Real>(params.total[0]);
    for_each_chunk(slab.width, [&](std::int64_t w, std::int64_t n) {
      const std::int64_t c = slab.channel + w;
      const auto stats = StatsChunk<Real>::load(at<Real>(params.stats, c), p.channels, n);
      const Values weight = Values::load(at<Real>(params.weight, c), n, Real(1));
      for (std::int64_t k = 0; k < n; ++k) {
        const Sums<Real> sums{static_cast<Real>(params.sums[c + k]),
                              static_cast<Real>(params.sums[p.channels + c + k])};
        const Projection<Real> by = brn::projection(sums, count, stats[k], weight[k], true);
        out.mean_g[w + k] = by.mean_g;
        out.slope[w + k] = by.slope;
        out.scale[w + k] = by.scale;
      }
      stats.centre.store(centre + w, n);
    });
  }

  static constexpr PerChannel<Real> per_channel() {
    return {merge_moments, merge_sums, step, affine, gradients, projection};
  }
};

}  // namespace
}  // namespace brn::cpu
