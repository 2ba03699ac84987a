// dx of one rank, with the sums of all: reads dy and x once and writes dx, which is the floor.
#include "elementwise.h"
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
    per_channel<Real>().projection(slab, problem, params, facts[kCentre],
                                   {facts[kMeanG], facts[kSlope], facts[kScale]});
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
