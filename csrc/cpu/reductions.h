// The reducing halves of a pass (see run() in slabs.h), each shared by two passes: the forward pass
// and the moments of one rank; the backward pass and the sums of one rank.
#pragma once

#include "channel.h"
#include "element.h"
#include "isa.h"
#include "slabs.h"

#include <algorithm>
#include <cstdint>

namespace brn::cpu {

template <typename T>
struct MomentsReduction {
  using Real = RealOf<T>;
  enum Fact { kPivot };
  enum Row { kMean, kMeanError, kM2, kPartials };

  const Problem& problem;
  const T* x;

  // In kChannelsFirst a pivot is read with its channel: a line of each channel of the slab, one
  // after the other and before the rest, took 6% of a forward (Zen 3, (1, 512, 28, 28) float32).
  void begin(const Part& slab, const Table<Real>& facts) const {
    if (slab.layout != Layout::kChannelsLast) return;
    // Of its first part alone, where rows are wide, pivots would be of a row or two: error of
    // dweight in last places in parity's "dy of mean 3, wide rows", float32, float16 and bfloat16,
    // 16, 33 and 30, so 5, 8 and 8.
    Part whole = slab;
    whole.end = problem.reduced();
    sweeps<T>().pivots(whole, x, facts[kPivot]);
  }

  void reduce(const Part& part, const Table<Real>& facts, const Table<Real>& moments) const {
    sweeps<T>().moments(part, x, facts[kPivot], moments[kMean], moments[kM2]);
    if (part.begin == 0) std::fill_n(moments[kMeanError], part.width, Real(0));
  }

  // merge() of math.h, with a mean in two Reals: parts may be many, and in one each would round it
  // once more. (32, 2048, 7, 7) float32 in kChannelsLast, 49 parts, dy of mean 3, error of dweight
  // in last places (the parity harness's measure): 6 so, 37 in one, plain PyTorch 28.
  void merge(const Part& part, const Table<Real>& moments, const Table<Real>& total) const {
    const Real before = static_cast<Real>(part.begin);
    const Real weight = static_cast<Real>(part.end - part.begin) / static_cast<Real>(part.end);
    for (std::int64_t w = 0; w < part.width; ++w) {
      Real& mean = total[kMean][w];
      Real& error = total[kMeanError][w];
      const Real delta = (moments[kMean][w] - mean) - error;
      const TwoSum<Real> moved = two_sum(mean, delta * weight);
      mean = moved.sum;
      error += moved.error;
      total[kM2][w] += moments[kM2][w] + delta * delta * before * weight;
    }
  }
};

// What a channel's sums come to, in twice the precision of Real.
struct ExactSums {
  double g;
  double gx;
};

template <typename Real>
struct SumsChunk {
  Chunk<Real> g, g_error, gx, gx_error;  // gx: around the centre
  Chunk<Real> residue;                   // of the mean

  // The error of an infinite sum is NaN.
  static double exact(Real sum, Real error) {
    return error == error ? static_cast<double>(sum) + static_cast<double>(error)
                          : static_cast<double>(sum);
  }
  ExactSums exact(std::int64_t k) const {
    const double sum_g = exact(g[k], g_error[k]);
    return {sum_g, exact(gx[k], gx_error[k]) - static_cast<double>(residue[k]) * sum_g};
  }
  Sums<Real> operator[](std::int64_t k) const {
    const ExactSums sums = exact(k);
    return {static_cast<Real>(sums.g), static_cast<Real>(sums.gx)};
  }
};

// stats null: inference, around the moving mean.
template <typename T>
struct SumsReduction {
  using Real = RealOf<T>;
  enum Fact { kCentre, kResidue };
  enum Row { kG, kGError, kGx, kGxError, kPartials };

  const Problem& problem;
  const T* dy;
  const T* x;
  const void* stats;
  const void* running_mean;
  const void* running_std;

  bool training() const { return stats != nullptr; }

  StatsChunk<Real> stats_of(std::int64_t c, std::int64_t n) const {
    return training() ? StatsChunk<Real>::load(at<Real>(stats, c), problem.channels, n)
                      : StatsChunk<Real>::of_running(at<Real>(running_mean, c),
                                                     at<Real>(running_std, c), n);
  }

  SumsChunk<Real> sums_of(const Table<Real>& total, const Table<Real>& facts, std::int64_t w,
                          std::int64_t n) const {
    return {Chunk<Real>::load(total[kG] + w, n), Chunk<Real>::load(total[kGError] + w, n),
            Chunk<Real>::load(total[kGx] + w, n), Chunk<Real>::load(total[kGxError] + w, n),
            Chunk<Real>::load(facts[kResidue] + w, n)};
  }

  void begin(const Part& slab, const Table<Real>& facts) const {
    for_each_chunk(slab.width, [&](std::int64_t w, std::int64_t n) {
      const StatsChunk<Real> s = stats_of(slab.channel + w, n);
      s.centre.store(facts[kCentre] + w, n);
      s.residue.store(facts[kResidue] + w, n);
    });
    sweeps<T>().arrange(slab, facts[kCentre]);
  }

  void reduce(const Part& part, const Table<Real>& facts, const Table<Real>& sums) const {
    sweeps<T>().sums(part, dy, x, facts[kCentre],
                     {sums[kG], sums[kGError], sums[kGx], sums[kGxError]});
  }

  void merge(const Part& part, const Table<Real>& sums, const Table<Real>& total) const {
    for (const Row row : {kG, kGx}) {
      Real* const sum = total[row];
      Real* const error = total[row + 1];
      const Real* const more = sums[row];
      const Real* const more_error = sums[row + 1];
      for (std::int64_t w = 0; w < part.width; ++w) {
        const Real before = sum[w];
        const Real next = before + more[w];
        const Real added = next - before;
        error[w] += more_error[w] + ((before - (next - added)) + (more[w] - added));
        sum[w] = next;
      }
    }
  }
};

}  // namespace brn::cpu
