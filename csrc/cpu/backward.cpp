// Backward pass of a training step, or of inference: dx, dweight and dbias.
//
//   reduce   reads dy and x
//   write    reads both again, from the cache as far as the slab fits it, and writes dx
//
// 2 reads + 1 write is the floor; a slab larger than the caches is read from memory twice.
#include "channel.h"
#include "pages.h"
#include "slabs.h"

namespace brn::cpu {
namespace {

template <typename T>
struct Backward {
  using Real = RealOf<T>;
  using Partial = double;
  enum Fact { kPivot, kOffset, kMeanG, kSlope, kScale, kFacts };
  enum Row { kG, kGx, kPartials };

  const Problem& problem;
  const BackwardParams& params;

  const T* x() const { return static_cast<const T*>(params.x); }
  const T* dy() const { return static_cast<const T*>(params.dy); }
  bool training() const { return params.stats != nullptr; }

  ChannelStats<Real> stats_of(std::int64_t c) const {
    return training() ? load_stats<Real>(params.stats, problem.channels, c)
                      : inference_stats(load_running<Real>(params.running_mean, params.running_std, c));
  }

  void begin(const Part& slab, const Table<Real>& facts) const {
    for (std::int64_t w = 0; w < slab.width; ++w) {
      const ChannelStats<Real> stats = stats_of(slab.channel + w);
      facts[kPivot][w] = stats.pivot;
      facts[kOffset][w] = stats.offset;
    }
  }

  void reduce(const Part& part, const Table<Real>& facts, const Table<double>& sums) const {
    sweeps<T>().sums(part, dy(), x(), {facts[kPivot], facts[kOffset]}, sums[kG], sums[kGx]);
  }

  void merge(const Part& part, const Table<double>& sums, const Table<double>& total) const {
    for (std::int64_t w = 0; w < part.width; ++w) {
      total[kG][w] += sums[kG][w];
      total[kGx][w] += sums[kGx][w];
    }
  }

  void finish(const Part& slab, const Table<double>& total, const Table<Real>& facts) const {
    for (std::int64_t w = 0; w < slab.width; ++w) {
      const std::int64_t c = slab.channel + w;
      const Sums<Real> sums{static_cast<Real>(total[kG][w]), static_cast<Real>(total[kGx][w])};
      const ChannelStats<Real> stats = stats_of(c);
      static_cast<Real*>(params.dweight)[c] = weight_gradient(sums, stats);
      static_cast<Real*>(params.dbias)[c] = sums.g;
      const Projection<Real> projected = projection(sums, static_cast<Real>(problem.reduced()), stats,
                                                    value_or(params.weight, c, Real(1)), training());
      facts[kMeanG][w] = projected.mean_g;
      facts[kSlope][w] = projected.slope;
      facts[kScale][w] = projected.scale;
    }
  }

  void write(const Part& part, const Table<Real>& facts) const {
    sweeps<T>().project(part, dy(), x(), {facts[kPivot], facts[kOffset]}, {facts[kMeanG], facts[kSlope], facts[kScale]},
                        static_cast<T*>(params.dx));
  }
};

template <typename T>
void backward_of(const Problem& p, const BackwardParams& params, const Parallel& parallel) {
  prefer_huge_pages(params.dx, p.elements() * size_of(p.dtype));
  run(cut(p, 2), parallel, Backward<T>{p, params});
}

}  // namespace

void backward(const Problem& p, const BackwardParams& params, const Parallel& parallel) {
  with_element(p.dtype, [&](auto t) { backward_of<decltype(t)>(p, params, parallel); });
}

}  // namespace brn::cpu
