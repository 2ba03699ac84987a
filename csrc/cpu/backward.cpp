// Backward pass of a training step, or of inference: dx, dweight and dbias.
//
//   reduce   reads dy and x
//   write    reads both again, from the cache as far as the slab fits it, and writes dx
//
// 2 reads + 1 write is the floor; a slab larger than the caches is read from memory twice.
#include "pages.h"
#include "reductions.h"
#include "slabs.h"

namespace brn::cpu {
namespace {

template <typename T>
struct Backward : SumsReduction<T> {
  using Real = RealOf<T>;
  using Reduction = SumsReduction<T>;
  using Reduction::dy, Reduction::problem, Reduction::x;
  enum Fact { kCentre = Reduction::kCentre, kResidue, kMeanG, kSlope, kScale, kFacts };

  const BackwardParams& params;

  void finish(const Part& slab, const Table<Real>& total, const Table<Real>& facts) const {
    per_channel<Real>().gradients(slab, problem, params, Reduction::rows_of(total), facts[kResidue],
                                  {facts[kMeanG], facts[kSlope], facts[kScale]});
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
