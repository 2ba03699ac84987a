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
  enum Fact { kPivot, kOffset, kMeanG, kSlope, kScale, kFacts };
  enum Row { kG, kGError, kGx, kGxError, kPartials };

  const Problem& problem;
  const BackwardParams& params;

  const T* x() const { return static_cast<const T*>(params.x); }
  const T* dy() const { return static_cast<const T*>(params.dy); }
  // The error of an infinite sum is NaN.
  static double exact(Real sum, Real error) {
    return error == error ? static_cast<double>(sum) + static_cast<double>(error) : static_cast<double>(sum);
  }

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

  void reduce(const Part& part, const Table<Real>& facts, const Table<Real>& sums) const {
    sweeps<T>().sums(part, dy(), x(), {facts[kPivot], facts[kOffset]},
                     {sums[kG], sums[kGError], sums[kGx], sums[kGxError]});
  }

  void merge(const Part& part, const Table<Real>& sums, const Table<Real>& total) const {
    for (const Row row : {kG, kGx}) {
      const Row error = static_cast<Row>(row + 1);
      for (std::int64_t w = 0; w < part.width; ++w) {
        const double both = exact(total[row][w], total[error][w]) + exact(sums[row][w], sums[error][w]);
        total[row][w] = static_cast<Real>(both);
        total[error][w] = static_cast<Real>(both - static_cast<double>(total[row][w]));
      }
    }
  }

  void finish(const Part& slab, const Table<Real>& total, const Table<Real>& facts) const {
    for (std::int64_t w = 0; w < slab.width; ++w) {
      const std::int64_t c = slab.channel + w;
      const Sums<Real> sums{static_cast<Real>(exact(total[kG][w], total[kGError][w])),
                            static_cast<Real>(exact(total[kGx][w], total[kGxError][w]))};
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
  run(cut(p), parallel, Backward<T>{p, params});
}

}  // namespace

void backward(const Problem& p, const BackwardParams& params, const Parallel& parallel) {
  with_element(p.dtype, [&](auto t) { backward_of<decltype(t)>(p, params, parallel); });
}

}  // namespace brn::cpu
