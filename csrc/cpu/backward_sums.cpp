// The reductions of one rank's backward pass, and its dweight and dbias: reads dy and x once.
#include "channel.h"
#include "reductions.h"
#include "slabs.h"

namespace brn::cpu {
namespace {

template <typename T>
struct RankSums : SumsReduction<T> {
  using Real = RealOf<T>;
  using Reduction = SumsReduction<T>;
  enum Fact { kCentre = Reduction::kCentre, kResidue, kMeanG, kSlope, kScale, kFacts };

  const BackwardSumsParams& params;

  // The projection is left for when the sums of all are known.
  void finish(const Part& slab, const Table<Real>& total, const Table<Real>& facts) const {
    const SumRows<Real> rows = Reduction::rows_of(total);
    BackwardParams gradients;
    gradients.stats = params.stats;
    gradients.dweight = params.dweight;
    gradients.dbias = params.dbias;
    per_channel<Real>().gradients(slab, this->problem, gradients, rows, facts[kResidue],
                                  {facts[kMeanG], facts[kSlope], facts[kScale]});
    double* const sum_g = params.sums + slab.channel;
    double* const sum_gx = sum_g + this->problem.channels;
    for_each_chunk(slab.width, [&](std::int64_t w, std::int64_t n) {
      const SumsChunk<Real> sums = SumsChunk<Real>::load(rows, facts[kResidue], w, n);
      for (std::int64_t k = 0; k < n; ++k) {
        const ExactSums exact = sums.exact(k);
        sum_g[w + k] = exact.g;
        sum_gx[w + k] = exact.gx;
      }
    });
  }

  void write(const Part&, const Table<Real>&) const {}
};

template <typename T>
void backward_sums_of(const Problem& p, const BackwardSumsParams& params,
                      const Parallel& parallel) {
  run(cut(p, 2), parallel,
      RankSums<T>{{p, static_cast<const T*>(params.dy), static_cast<const T*>(params.x),
                   params.stats, nullptr, nullptr},
                  params});
}

}  // namespace

void backward_sums(const Problem& p, const BackwardSumsParams& params, const Parallel& parallel) {
  with_element(p.dtype, [&](auto t) { backward_sums_of<decltype(t)>(p, params, parallel); });
}

}  // namespace brn::cpu
