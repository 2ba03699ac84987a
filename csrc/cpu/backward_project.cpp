// dx of one rank, with the sums of all: reads dy and x once and writes dx, which is the floor.
#include "../core/ranks.h"
#include "channel.h"
#include "elementwise.h"
#include "launch.h"
#include "pages.h"

namespace brn::cpu {
namespace {

template <typename T>
struct Project {
  using Real = RealOf<T>;
  enum Fact { kCentre, kMeanG, kSlope, kScale, kFacts };
  enum Row { kPartials };

  const Problem& problem;
  const BackwardProjectParams& params;

  void begin(const Part& slab, const Table<Real>& facts) const {
    const Real count = static_cast<Real>(params.total[0]);
    for_each_chunk(slab.width, [&](std::int64_t w, std::int64_t n) {
      const std::int64_t c = slab.channel + w;
      const auto stats = StatsChunk<Real>::load(at<Real>(params.stats, c), problem.channels, n);
      const auto weight = Chunk<Real>::load(at<Real>(params.weight, c), n, Real(1));
      for (std::int64_t k = 0; k < n; ++k) {
        const Sums<Real> sums{static_cast<Real>(params.sums[c + k]),
                              static_cast<Real>(params.sums[problem.channels + c + k])};
        const Projection<Real> p = projection(sums, count, stats[k], weight[k], true);
        facts[kCentre][w + k] = stats[k].centre;
        facts[kMeanG][w + k] = p.mean_g;
        facts[kSlope][w + k] = p.slope;
        facts[kScale][w + k] = p.scale;
      }
    });
    for (const Fact row : {kCentre, kMeanG, kSlope, kScale}) sweeps<T>().arrange(slab, facts[row]);
  }

  void write(const Part& part, const Table<Real>& facts) const {
    sweeps<T>().project(part, static_cast<const T*>(params.dy), static_cast<const T*>(params.x),
                        facts[kCentre], {facts[kMeanG], facts[kSlope], facts[kScale]},
                        static_cast<T*>(params.dx));
  }
};

template <typename T>
void backward_project_of(const Problem& p, const BackwardProjectParams& params,
                         const Parallel& parallel) {
  prefer_huge_pages(params.dx, p.elements() * size_of(p.dtype));
  run_in_order(p, parallel, Project<T>{p, params});
}

}  // namespace

void backward_project(const Problem& p, const BackwardProjectParams& params,
                      const Parallel& parallel) {
  with_element(p.dtype, [&](auto t) { backward_project_of<decltype(t)>(p, params, parallel); });
}

}  // namespace brn::cpu
