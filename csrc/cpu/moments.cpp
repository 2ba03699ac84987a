// The moments of one rank's batch: reads x once.
#include "../core/ranks.h"
#include "reductions.h"
#include "slabs.h"

namespace brn::cpu {
namespace {

template <typename T>
struct RankMoments : MomentsReduction<T> {
  using Real = RealOf<T>;
  using Reduction = MomentsReduction<T>;
  enum Fact { kPivot = Reduction::kPivot, kFacts };

  double* message;

  void finish(const Part& slab, const Table<Real>& total, const Table<Real>& facts) const {
    double* mean = message + slab.channel;
    double* m2 = mean + this->problem.channels;
    for (std::int64_t w = 0; w < slab.width; ++w) {
      mean[w] = static_cast<double>(facts[kPivot][w]) +
                static_cast<double>(total[Reduction::kMean][w]) +
                static_cast<double>(total[Reduction::kMeanError][w]);
      m2[w] = static_cast<double>(total[Reduction::kM2][w]);
    }
  }

  void write(const Part&, const Table<Real>&) const {}
};

template <typename T>
void moments_of(const Problem& p, const MomentsParams& params, const Parallel& parallel) {
  run(cut(p, 1), parallel, RankMoments<T>{{p, static_cast<const T*>(params.x)}, params.message});
  params.message[2 * p.channels] = static_cast<double>(p.reduced());
  params.message[2 * p.channels + 1] = params.backward ? 1.0 : 0.0;
}

}  // namespace

void moments(const Problem& p, const MomentsParams& params, const Parallel& parallel) {
  with_element(p.dtype, [&](auto t) { moments_of<decltype(t)>(p, params, parallel); });
}

}  // namespace brn::cpu
