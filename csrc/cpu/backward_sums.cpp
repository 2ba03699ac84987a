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
  enum Fact { kCentre = Reduction::kCentre, kResidue, kFacts };

  const BackwardSumsParams& params;

  void finish(const Part& slab, const Table<Real>& total, const Table<Real>& facts) const {
    const std::int64_t channels = this->problem.channels;
    for_each_chunk(slab.width, [&](std::int64_t w, std::int64_t n) {
      const std::int64_t c = slab.channel + w;
      const auto stats = StatsChunk<Real>::load(this->stats_from(slab.channel), w, n);
      const auto sums =
          SumsChunk<Real>::load(Reduction::rows_of(total), facts[Reduction::kResidue], w, n);
      for (std::int64_t k = 0; k < n; ++k) {
        const ExactSums exact = sums.exact(k);
        params.sums[c + k] = exact.g;
        params.sums[channels + c + k] = exact.gx;
        at<Real>(params.dweight, c)[k] = weight_gradient(sums[k], stats[k]);
        at<Real>(params.dbias, c)[k] = sums[k].g;
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
