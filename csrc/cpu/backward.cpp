// Backward pass of a training step, or of inference: dx, dweight and dbias.
//
//   reduce   reads dy and x
//   write    reads both again, from the cache as far as the slab fits it, and writes dx
//
// 2 reads + 1 write is the floor; a slab larger than the caches is read from memory twice.
#include "channel.h"
#include "pages.h"
#include "reductions.h"
#include "slabs.h"

namespace brn::cpu {
namespace {

template <typename T>
struct Backward : SumsReduction<T> {
  using Real = RealOf<T>;
  using Reduction = SumsReduction<T>;
  using Reduction::dy, Reduction::problem, Reduction::stats_of, Reduction::training, Reduction::x;
  enum Fact { kCentre = Reduction::kCentre, kResidue, kMeanG, kSlope, kScale, kFacts };

  const BackwardParams& params;

  void finish(const Part& slab, const Table<Real>& total, const Table<Real>& facts) const {
    using Values = Chunk<Real>;
    const Real count = static_cast<Real>(problem.reduced());
    for_each_chunk(slab.width, [&](std::int64_t w, std::int64_t n) {
      const std::int64_t c = slab.channel + w;
      const StatsChunk<Real> stats = stats_of(c, n);
      const Values weight = Values::load(at<Real>(params.weight, c), n, Real(1));
      const SumsChunk<Real> sums = this->sums_of(total, facts, w, n);
      Values dweight, dbias, mean_g, slope, scale;
      for (std::int64_t k = 0; k < n; ++k) {
        const Sums<Real> both = sums[k];
        const Projection<Real> p = projection(both, count, stats[k], weight[k], training());
        dweight[k] = weight_gradient(both, stats[k]);
        dbias[k] = both.g;
        mean_g[k] = p.mean_g;
        slope[k] = p.slope;
        scale[k] = p.scale;
      }
      dweight.store(at<Real>(params.dweight, c), n);
      dbias.store(at<Real>(params.dbias, c), n);
      mean_g.store(facts[kMeanG] + w, n);
      slope.store(facts[kSlope] + w, n);
      scale.store(facts[kScale] + w, n);
    });
    for (const Fact row : {kMeanG, kSlope, kScale}) sweeps<T>().arrange(slab, facts[row]);
  }

  void write(const Part& part, const Table<Real>& facts) const {
    sweeps<T>().project(part, dy, x, facts[kCentre], {facts[kMeanG], facts[kSlope], facts[kScale]},
                        static_cast<T*>(params.dx));
  }
};

template <typename T>
void backward_of(const Problem& p, const BackwardParams& params, const Parallel& parallel) {
  prefer_huge_pages(params.dx, p.elements() * size_of(p.dtype));
  run(cut(p, 2), parallel,
      Backward<T>{{p, static_cast<const T*>(params.dy), static_cast<const T*>(params.x),
                   params.stats, params.running_mean, params.running_std},
                  params});
}

}  // namespace

void backward(const Problem& p, const BackwardParams& params, const Parallel& parallel) {
  with_element(p.dtype, [&](auto t) { backward_of<decltype(t)>(p, params, parallel); });
}

}  // namespace brn::cpu
