// The arithmetic of Batch Renormalization, one copy for the CUDA kernels, the CPU kernels and the
// tests. Functions are pure, work on one channel or one element, and never touch memory.
//
// Notation follows Ioffe (2017), Algorithm 1. Real is the type of statistics: float, or double for
// double tensors.
//
// A channel is reduced around a pivot, its own first element or the mean of its first ones: u = x -
// pivot. One Real cannot hold the mean of a channel with |mean| / std = 1e4 well enough; the pair
// (pivot, offset), mean = pivot + offset, can. Mean error at |mean| / std = 1000 and m = 262144, in
// units of std: 1.8e-5 for one float, 5.6e-9 for the pair.
//
// Elementwise the mean is another pair, of which the first is near it: x - mean = (x - centre) -
// residue, and the residue goes into a term that is added anyway. An element so costs one
// subtraction and one parameter less than with (x - pivot) - offset, and is as accurate.
#pragma once

#include "host_device.h"

#include <cmath>
#include <cstdint>

namespace brn {

// Count, mean and sum of squared deviations of a set of samples: the state of Welford's algorithm.
template <typename Real>
struct Moments {
  Real count;
  Real mean;
  Real m2;
};

// Chan et al.: the moments of a union from the moments of its parts. Either part may be empty.
template <typename Real>
BRN_HD Moments<Real> merge(Moments<Real> a, Moments<Real> b) {
  const Real count = a.count + b.count;
  const Real weight = count > Real(0) ? b.count / count : Real(0);
  const Real delta = b.mean - a.mean;
  return {count, a.mean + delta * weight, a.m2 + b.m2 + delta * delta * a.count * weight};
}

// Knuth's two-sum: sum + error is exactly a + b.
template <typename Real>
struct TwoSum {
  Real sum;
  Real error;
};
template <typename Real>
BRN_HD TwoSum<Real> two_sum(Real a, Real b) {
  const Real sum = a + b;
  const Real added = sum - a;
  return {sum, (a - (sum - added)) + (b - added)};
}

// Moments whose mean is held in two Reals: moments.mean, and what rounding it has left.
template <typename Real>
struct ExactMoments {
  Moments<Real> moments;
  Real residue;
};

template <typename Real>
struct PivotedMoments {
  Real pivot;
  Moments<Real> moments;
};

// Around the mean, rounded, for a pivot. One that the mean is far off leaves an offset that is
// rounded coarsely.
template <typename Real>
BRN_HD PivotedMoments<Real> around_mean(ExactMoments<Real> m, Real pivot) {
  const TwoSum<Real> most = two_sum(pivot, m.moments.mean);
  const TwoSum<Real> mean = two_sum(most.sum, most.error + m.residue);
  return {mean.sum, {m.moments.count, mean.error, m.moments.m2}};
}

// The two reductions of the backward pass: sum(dy) and sum(dy * (x - mean)).
template <typename Real>
struct Sums {
  Real g;
  Real gx;
};

// From those with x - centre.
template <typename Real>
BRN_HD Sums<Real> around_mean(Sums<Real> s, Real residue) {
  return {s.g, s.gx - residue * s.g};
}

template <typename Real>
BRN_HD Sums<Real> merge(Sums<Real> a, Sums<Real> b) {
  return {a.g + b.g, a.gx + b.gx};
}

template <typename Real>
struct Limits {
  Real r_max;  // >= 1; 1 turns the scale correction off, infinity lifts the limit
  Real d_max;  // >= 0; 0 turns the shift correction off, infinity lifts the limit
};

// The five numbers of a schedule, in the order of the layer's buffer.
struct Schedule {
  double warmup_steps;
  double r_max;
  double r_max_step;
  double d_max;
  double d_max_step;
};

// `from` until `start`, `to` from `end` on, a straight line between. `end` first: a jump has start
// == end. An infinite `to` takes effect with the first step after `start`.
BRN_HD double ramp(double step, double start, double end, double from, double to) {
  if (step >= end) return to;
  if (step <= start) return from;
  return from + (to - from) * ((step - start) / (end - start));
}

// The limits of the batch that comes after `step` others.
template <typename Real>
BRN_HD Limits<Real> limits_at(const Schedule& s, std::int64_t step) {
  const double t = static_cast<double>(step);
  return {static_cast<Real>(ramp(t, s.warmup_steps, s.r_max_step, 1.0, s.r_max)),
          static_cast<Real>(ramp(t, s.warmup_steps, s.d_max_step, 0.0, s.d_max))};
}

// The weight of this batch in the moving averages. A negative momentum stands for the cumulative
// average.
constexpr double kCumulative = -1.0;

template <typename Real>
BRN_HD Real averaging_weight(double momentum, std::int64_t step) {
  return static_cast<Real>(momentum >= 0.0 ? momentum : 1.0 / (static_cast<double>(step) + 1.0));
}

// NaN passes through, as in torch.clamp.
template <typename Real>
BRN_HD Real clamp(Real x, Real lo, Real hi) {
  return x < lo ? lo : (x > hi ? hi : x);
}

// Whether 1 / std is finite. Only a channel that never varies is without a scale, and only with
// eps = 0; its x - mean is 0 then. NaN is a scale: it has to show.
template <typename Real>
BRN_HD bool has_scale(Real std) {
  constexpr double kSmallestNormal =
      sizeof(Real) == 8 ? 2.2250738585072014e-308 : 1.1754943508222875e-38;
  return !(std < static_cast<Real>(kSmallestNormal));
}

template <typename Real>
BRN_HD Real reciprocal(Real std) {
  return has_scale(std) ? Real(1) / std : Real(0);
}

template <typename Real>
struct Renorm {
  Real r;
  Real d;
};

// What one batch says of one channel: a column of the [5][C] tensor that forward returns and
// backward reads.
template <typename Real>
struct ChannelStats {
  Real centre;   // near the mean, see centred()
  Real residue;  // mean - centre
  Real inv_std;  // 1 / sqrt(biased variance + eps)
  Real r;
  Real d;
};
constexpr int kStatRows = 5;

template <typename Real>
struct Running {
  Real mean;
  Real std;
};

template <typename Real>
struct Centre {
  Real centre;
  Real residue;
};

// A mean in such a pair that x - centre is exact for nearly all x: the centre is a multiple of what
// values as large as 64 `spread` are spaced by, and so is x, or finer.
//
// With the mean rounded to Real, low bits of it that x does not have are rounded off every x of one
// magnitude alike, and dweight has their sum, times the mean of dy. m = 200,704, x of mean 0, dy of
// mean 3, float32: error of dweight in last places (the parity harness's measure) 72 so, 17 with
// this.
template <typename Real>
BRN_HD Centre<Real> centred(TwoSum<Real> mean, Real spread) {
  const Real large = Real(64) * spread;
  const Real multiple = (mean.sum + large) - large;
  const Real centre = multiple == multiple ? multiple : mean.sum;  // where `large` is infinite
  return {centre, (mean.sum - centre) + mean.error};
}

// std of the paper: eps inside the root, variance biased.
template <typename Real>
BRN_HD Real batch_std(Moments<Real> m, Real epsilon) {
  return std::sqrt(m.m2 / m.count + epsilon);
}

// r and d of the paper, from the moving statistics before this batch. Constants under
// differentiation.
template <typename Real>
BRN_HD Renorm<Real> renorm(Real mean_minus_running, Real std, Real running_std, Limits<Real> l) {
  if (!has_scale(running_std)) return {Real(1), Real(0)};  // nothing to correct towards
  return {clamp(std / running_std, Real(1) / l.r_max, l.r_max),
          clamp(mean_minus_running / running_std, -l.d_max, l.d_max)};
}

// Algorithm 1 for one channel up to the normalisation: moments around the pivot -> statistics, r
// and d. `further` is what the moments' mean lacks.
template <typename Real>
BRN_HD ChannelStats<Real> channel_stats(Moments<Real> m, Real pivot, Real epsilon,
                                        Running<Real> running, Limits<Real> l,
                                        Real further = Real(0)) {
  const Real std = batch_std(m, epsilon);
  const Real inv_std = reciprocal(std);
  TwoSum<Real> mean = two_sum(pivot, m.mean);
  mean.error += further;
  // The standard deviation without eps, or less where eps decides: eps says nothing of the values,
  // and a grid too wide for them leaves the mean to the residue. Of equal values 0, which makes
  // them their own centre.
  const Centre<Real> c = centred(mean, m.m2 / m.count * inv_std);
  const Renorm<Real> by = renorm((c.centre - running.mean) + c.residue, std, running.std, l);
  return {c.centre, c.residue, inv_std, by.r, by.d};
}

// The moving averages after this batch. The average is taken of the standard deviation, as in the
// paper.
template <typename Real>
BRN_HD Running<Real> moved(Running<Real> old, Moments<Real> m, Real pivot, Real epsilon,
                           Real momentum) {
  return {old.mean + momentum * ((pivot - old.mean) + m.mean),
          old.std + momentum * (batch_std(m, epsilon) - old.std)};
}

// y = (x - centre) * scale + shift, never x * scale + (shift - mean * scale), which cancels.
template <typename Real>
struct Affine {
  Real centre;
  Real scale;
  Real shift;
};

template <typename Real>
BRN_HD Affine<Real> training_affine(ChannelStats<Real> s, Real weight, Real bias) {
  const Real scale = weight * (s.r * s.inv_std);
  return {s.centre, scale, (weight * s.d + bias) - s.residue * scale};
}

template <typename Real>
BRN_HD Affine<Real> inference_affine(Running<Real> running, Real weight, Real bias) {
  return {running.mean, weight * reciprocal(running.std), bias};
}

// Inference seen as a training step with the moving statistics: what its backward pass needs.
template <typename Real>
BRN_HD ChannelStats<Real> inference_stats(Running<Real> running) {
  return {running.mean, Real(0), reciprocal(running.std), Real(1), Real(0)};
}

template <typename Real>
BRN_HD Real apply(Affine<Real> a, Real x) {
  return (x - a.centre) * a.scale + a.shift;
}

// dx = (g - mean_g - (x - centre) * slope) * scale: g projected onto the null space of 1 and
// x_norm, then scaled. In inference nothing is projected out (mean_g = slope = 0).
template <typename Real>
struct Projection {
  Real mean_g;  // less what x - centre is off x - mean
  Real slope;
  Real scale;
};

template <typename Real>
BRN_HD Projection<Real> projection(Sums<Real> sums, Real count, ChannelStats<Real> s, Real weight,
                                   bool training) {
  const Real scale = weight * (s.r * s.inv_std);
  if (!training) return {Real(0), Real(0), scale};
  const Real slope = sums.gx / count * s.inv_std * s.inv_std;
  return {sums.g / count - s.residue * slope, slope, scale};
}

template <typename Real>
BRN_HD Real apply(Projection<Real> p, Real g, Real x_minus_centre) {
  return (g - p.mean_g - x_minus_centre * p.slope) * p.scale;
}

template <typename Real>
BRN_HD Real weight_gradient(Sums<Real> sums, ChannelStats<Real> s) {
  return s.r * (sums.gx * s.inv_std) + s.d * sums.g;
}

}  // namespace brn
