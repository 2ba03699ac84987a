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

  Affine<Real> affine_of(std::int64_t c) const {
    const Real weight = value_or(params.weight, c, Real(1));
    const Real bias = value_or(params.bias, c, Real(0));
    if (params.stats != nullptr) return training_affine(load_stats<Real>(params.stats, problem.channels, c), weight, bias);
    return inference_affine(load_running<Real>(params.running_mean, params.running_std, c), weight, bias);
  }

  void begin(const Part& slab, const Table<Real>& facts) const {
    for (std::int64_t w = 0; w < slab.width; ++w) {
      const Affine<Real> affine = affine_of(slab.channel + w);
      facts[kPivot][w] = affine.pivot;
      facts[kOffset][w] = affine.offset;
      facts[kScale][w] = affine.scale;
      facts[kShift][w] = affine.shift;
    }
  }

  void write(const Part& part, const Table<Real>& facts) const {
    sweeps<T>().normalise(part, static_cast<const T*>(params.x),
                          {facts[kPivot], facts[kOffset], facts[kScale], facts[kShift]}, static_cast<T*>(params.y));
  }
};

template <typename T>
void inference_of(const Problem& p, const InferenceParams& params, const Parallel& parallel) {
  using Pass = Inference<T>;
  prefer_huge_pages(params.y, p.elements() * size_of(p.dtype));
  const Pass pass{p, params};
  const Slabs slabs = cut(p);
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
