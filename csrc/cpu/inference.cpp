// The normalisation alone, with statistics at hand: reads x once and writes y, which is the floor.
#include "channel.h"
#include "pages.h"
#include "slabs.h"

namespace brn::cpu {
namespace {

template <typename T>
struct Inference {
  using Real = RealOf<T>;
  enum Fact { kPivot, kOffset, kScale, kShift, kFacts };
  enum Row { kPartials };

  const Problem& problem;
  const InferenceParams& params;

  void begin(const Part& slab, const Table<Real>& facts) const {
    using Values = Chunk<Real>;
    for_each_chunk(slab.width, [&](std::int64_t w, std::int64_t n) {
      const std::int64_t c = slab.channel + w;
      const Values weight = Values::load(at<Real>(params.weight, c), n, Real(1));
      const Values bias = Values::load(at<Real>(params.bias, c), n, Real(0));
      Values pivot, offset, scale, shift;
      const auto set = [&](std::int64_t k, Affine<Real> affine) {
        pivot[k] = affine.pivot;
        offset[k] = affine.offset;
        scale[k] = affine.scale;
        shift[k] = affine.shift;
      };
      if (params.stats != nullptr) {
        const auto stats = StatsChunk<Real>::load(at<Real>(params.stats, c), problem.channels, n);
        for (std::int64_t k = 0; k < n; ++k) set(k, training_affine(stats[k], weight[k], bias[k]));
      } else {
        const Values mean = Values::load(at<Real>(params.running_mean, c), n);
        const Values std = Values::load(at<Real>(params.running_std, c), n);
        for (std::int64_t k = 0; k < n; ++k)
          set(k, inference_affine<Real>({mean[k], std[k]}, weight[k], bias[k]));
      }
      pivot.store(facts[kPivot] + w, n);
      offset.store(facts[kOffset] + w, n);
      scale.store(facts[kScale] + w, n);
      shift.store(facts[kShift] + w, n);
    });
  }

  void write(const Part& part, const Table<Real>& facts) const {
    sweeps<T>().normalise(part, static_cast<const T*>(params.x),
                          {facts[kPivot], facts[kOffset], facts[kScale], facts[kShift]},
                          static_cast<T*>(params.y));
  }
};

template <typename T>
void inference_of(const Problem& p, const InferenceParams& params, const Parallel& parallel) {
  using Pass = Inference<T>;
  prefer_huge_pages(params.y, p.elements() * size_of(p.dtype));
  const Pass pass{p, params};
  const Slabs slabs = cut_in_order(p);
  for_stretches(p, parallel, slabs.count * slabs.parts, [&](std::int64_t begin, std::int64_t end) {
    const Tables<Pass> tables(1, 0, slabs.widest());
    const auto facts = tables.facts(0);
    for (std::int64_t k = begin; k < end; ++k) {
      const Part part = slabs.part(k / slabs.parts, k % slabs.parts);
      if (k == begin || part.begin == 0) pass.begin(part, facts);
      pass.write(part, facts);
    }
  });
}

}  // namespace

void inference(const Problem& p, const InferenceParams& params, const Parallel& parallel) {
  with_element(p.dtype, [&](auto t) { inference_of<decltype(t)>(p, params, parallel); });
}

}  // namespace brn::cpu
