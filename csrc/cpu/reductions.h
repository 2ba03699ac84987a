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
namespace {

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

  void merge(const Part& part, const Table<Real>& more, const Table<Real>& total) const {
    per_channel<Real>().merge_moments(part, rows_of(more), rows_of(total));
  }

  static MomentRows<Real> rows_of(const Table<Real>& moments) {
    return {moments[kMean], moments[kMeanError], moments[kM2]};
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

  static SumRows<Real> rows_of(const Table<Real>& sums) {
    return {sums[kG], sums[kGError], sums[kGx], sums[kGxError]};
  }

  void begin(const Part& slab, const Table<Real>& facts) const {
    for_each_chunk(slab.width, [&](std::int64_t w, std::int64_t n) {
      const auto s = StatsChunk<Real>::of(*this, problem.channels, slab.channel + w, n);
      s.centre.store(facts[kCentre] + w, n);
      s.residue.store(facts[kResidue] + w, n);
    });
    sweeps<T>().arrange(slab, facts[kCentre]);
  }

  void reduce(const Part& part, const Table<Real>& facts, const Table<Real>& sums) const {
    sweeps<T>().sums(part, dy, x, facts[kCentre], rows_of(sums));
  }

  void merge(const Part& part, const Table<Real>& more, const Table<Real>& total) const {
    per_channel<Real>().merge_sums(part, rows_of(more), rows_of(total));
  }
};

}  // namespace
}  // namespace brn::cpu
