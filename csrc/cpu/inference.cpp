// The normalisation alone, with statistics at hand: reads x once and writes y, which is the floor.
#include "channel.h"
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
    using Values = Chunk<Real>;
    for_each_chunk(slab.width, [&](std::int64_t w, std::int64_t n) {
      const std::int64_t c = slab.channel + w;
      const Values weight = Values::load(at<Real>(params.weight, c), n, Real(1));
      const Values bias = Values::load(at<Real>(params.bias, c), n, Real(0));
      Values centre, scale, shift;
      const auto set = [&](std::int64_t k, Affine<Real> affine) {
        centre[k] = affine.centre;
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
      centre.store(facts[kCentre] + w, n);
      scale.store(facts[kScale] + w, n);
      shift.store(facts[kShift] + w, n);
    });
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
