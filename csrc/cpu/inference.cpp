// The normalisation alone, with statistics at hand: reads x once and writes y, which is the floor.
#include "elementwise.h"
#include "pages.h"

namespace brn::cpu {
namespace {

template <typename T>
struct Inference {
  using Real = RealOf<T>;
  enum Fact { kCentre, kScale, kShift, kFacts };
  enum Row { kPartials };

  const Problem& problem;
  const InferenceParams& params;

  void begin(const Part& slab, const Table<Real>& facts) const {
    per_channel<Real>().affine(slab, problem, params,
                               {facts[kCentre], facts[kScale], facts[kShift]});
    for (const Fact row : {kCentre, kScale, kShift}) sweeps<T>().arrange(slab, facts[row]);
  }

  void write(const Part& part, const Table<Real>& facts) const {
    sweeps<T>().normalise(part, static_cast<const T*>(params.x),
                          {facts[kCentre], facts[kScale], facts[kShift]},
                          static_cast<T*>(params.y));
  }
};

template <typename T>
void inference_of(const Problem& p, const InferenceParams& params, const Parallel& parallel) {
  prefer_huge_pages(params.y, p.elements() * size_of(p.dtype));
  run_in_order(p, parallel, Inference<T>{p, params});
}

}  // namespace

void inference(const Problem& p, const InferenceParams& params, const Parallel& parallel) {
  with_element(p.dtype, [&](auto t) { inference_of<decltype(t)>(p, params, parallel); });
}

}  // namespace brn::cpu
