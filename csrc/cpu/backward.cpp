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
    return error == error ? static_cast<double>(sum) + static_cast<double>(error)
                          : static_cast<double>(sum);
  }

  bool training() const { return params.stats != nullptr; }

  StatsChunk<Real> stats_of(std::int64_t c, std::int64_t n) const {
    return training() ? StatsChunk<Real>::load(at<Real>(params.stats, c), problem.channels, n)
                      : StatsChunk<Real>::of_running(at<Real>(params.running_mean, c),
                                                     at<Real>(params.running_std, c), n);
  }

  void begin(const Part& slab, const Table<Real>& facts) const {
    for_each_chunk(slab.width, [&](std::int64_t w, std::int64_t n) {
      const StatsChunk<Real> stats = stats_of(slab.channel + w, n);
      stats.pivot.store(facts[kPivot] + w, n);
      stats.offset.store(facts[kOffset] + w, n);
    });
  }

  void reduce(const Part& part, const Table<Real>& facts, const Table<Real>& sums) const {
    sweeps<T>().sums(part, dy(), x(), {facts[kPivot], facts[kOffset]},
                     {sums[kG], sums[kGError], sums[kGx], sums[kGxError]});
  }

  void merge(const Part& part, const Table<Real>& sums, const Table<Real>& total) const {
    for (const Row row : {kG, kGx}) {
      const Row error = static_cast<Row>(row + 1);
      for (std::int64_t w = 0; w < part.width; ++w) {
        const double both =
            exact(total[row][w], total[error][w]) + exact(sums[row][w], sums[error][w]);
        total[row][w] = static_cast<Real>(both);
        total[error][w] = static_cast<Real>(both - static_cast<double>(total[row][w]));
      }
    }
  }

  void finish(const Part& slab, const Table<Real>& total, const Table<Real>& facts) const {
    using Values = Chunk<Real>;
    const Real count = static_cast<Real>(problem.reduced());
    for_each_chunk(slab.width, [&](std::int64_t w, std::int64_t n) {
      const std::int64_t c = slab.channel + w;
      const StatsChunk<Real> stats = stats_of(c, n);
      const Values weight = Values::load(at<Real>(params.weight, c), n, Real(1));
      const Values g = Values::load(total[kG] + w, n);
      const Values g_error = Values::load(total[kGError] + w, n);
      const Values gx = Values::load(total[kGx] + w, n);
      const Values gx_error = Values::load(total[kGxError] + w, n);
      Values dweight, dbias, mean_g, slope, scale;
      for (std::int64_t k = 0; k < n; ++k) {
        const Sums<Real> sums{static_cast<Real>(exact(g[k], g_error[k])),
                              static_cast<Real>(exact(gx[k], gx_error[k]))};
        const Projection<Real> p = projection(sums, count, stats[k], weight[k], training());
        dweight[k] = weight_gradient(sums, stats[k]);
        dbias[k] = sums.g;
        mean_g[k] = p.mean_g;
        slope[k] = p.slope;
        scale[k] = p.scale;
      }
      dweight.store(at<Real>(params.dweight, c), n);
      dbias.store(at<Real>(params.dbias, c), n);
      mean_g.store(facts[kMeanG] + w, n);
      slope.store(facts[kSlope] + w, n);
      scale.store(facts[kScale] + w, n);
    });
  }

  void write(const Part& part, const Table<Real>& facts) const {
    sweeps<T>().project(part, dy(), x(), {facts[kPivot], facts[kOffset]},
                        {facts[kMeanG], facts[kSlope], facts[kScale]}, static_cast<T*>(params.dx));
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
