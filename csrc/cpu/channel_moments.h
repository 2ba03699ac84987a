// Moments of a channel of kChannelsFirst.
#pragma once

#include "accumulate.h"
#include "chains.h"
#include "isa.h"
#include "lanes.h"
#include "runs.h"

#include <cstdint>
#include <type_traits>

namespace brn::cpu {
namespace {

// Moments, lane by lane and in one sweep: deviations from a centre that is a lane's first element
// and, from the second block on, its mean so far. m2 is the squares less what the mean moves by,
// and what that cancels is bounded by the number of vectors in the first block, which is short, or
// begins with recentre().
template <typename T>
struct BlockMoments {
  using Real = RealOf<T>;
  static constexpr int kFirstBlock = 8;  // vectors

  Lanes<T> pivot;
  ExactSum<Lanes<T>> mean;  // of x - pivot
  Lanes<T> centre;          // pivot + mean, rounded
  Lanes<T> m2;
  Lanes<T> count;

  BlockMoments() = default;
  BRN_LANES BlockMoments(Lanes<T> pivots, Lanes<T> first)
      : pivot(pivots), mean{first - pivots, {}}, centre(pivot + mean.sum), m2{}, count{} {}

  // Of the centre.
  BRN_LANES Lanes<T> residue() const { return two_sum(pivot, mean.sum).error + mean.error; }

  // The mean is kept in two Reals: in one, every block would round it once more, and dweight has
  // that error times the sum of dy. (32, 16, 64, 64) float32, x of mean 0 and dy of mean 3, error
  // of dweight in its last place: one Real and the first element for a pivot 202, take_mean_pivot()
  // 90, both 37, native 37.
  BRN_LANES void move(Lanes<T> step) {
    mean.add(step);
    centre = pivot + mean.sum;
  }

  // The centre becomes the mean of `made` elements of each lane, which deviate so from what it was.
  BRN_LANES void recentre(Lanes<T> made, LaneSums<T> sums) {
    move((sums.values - made * residue()) / made);
  }

  // What `made` elements of each lane come to around the centre, and their squares.
  BRN_LANES void add_block(Lanes<T> made, LaneSums<T> sums) {
    const Lanes<T> rest = residue();
    const Lanes<T> d = sums.values - made * rest;  // around pivot + mean
    const Lanes<T> dd = sums.products - (sums.values + d) * rest;
    count += made;
    const Lanes<T> step = d / at_least_one(count);
    m2 += dd - d * step;
    move(step);
  }

  BRN_LANES SharedMoments<Real, Real> across(Real n) const {
    const Real some = mean.sum.v[0][0];  // near all of them
    const Lanes<T> from_some = (mean.sum - Lanes<T>::of(some)) + mean.error;
    const Real further = sum_across(count * from_some) / n;
    const Lanes<T> apart = from_some - Lanes<T>::of(further);
    return {n, some + further, sum_across(m2 + count * apart * apart)};
  }
};

// Run by run, in chains.
template <typename T>
struct ChannelMoments : BlockMoments<T> {
  using Real = RealOf<T>;
  using BlockMoments<T>::add_block, BlockMoments<T>::centre;

  Chains<T> chains{BlockMoments<T>::kFirstBlock};
  Lanes<T> in_tails{};  // elements of this block that did not come in a whole vector

  BRN_LANES ChannelMoments(Lanes<T> pivots, Lanes<T> first) : BlockMoments<T>(pivots, first) {}

  BRN_LANES void close() {
    const Lanes<T> made = Lanes<T>::of(static_cast<Real>(chains.vectors - chains.tails)) + in_tails;
    add_block(made, chains.take());
    in_tails = {};
  }

  template <Fetched kFetched>
  BRN_LANES void add_run(const T* x, std::int64_t length, std::int64_t next) {
    constexpr int kStep = kLanes<T>;
    const auto sums_of = [](Lanes<T> d) BRN_INLINED { return LaneSums<T>::of(d, d); };
    chains.add_run(
        length, [&](std::int64_t i) BRN_INLINED { return sums_of(load(x + i) - centre); },
        [&](std::int64_t i) BRN_INLINED {
          const Mask<T> mask =
              length >= kStep ? last_elements<T>(length - i) : first_elements<T>(length);
          in_tails += mask(Lanes<T>::of(1));
          const Lanes<T> v = length >= kStep ? load(x + length - kStep) : load_first(x, length);
          return sums_of(mask(v - centre));
        },
        [&](std::int64_t i) BRN_INLINED {
          if constexpr (kFetched != Fetched::kNothing) fetch(x + i + next);
        },
        [&]() BRN_INLINED { close(); });
  }
};

// Sums of deviations(v) over vectors v of x, and of their squares. As plane_products().
template <typename T, typename Fetch, typename Deviation, typename Ahead = std::false_type>
BRN_LANES LaneSums<T> plane_deviations(const Part& part, std::int64_t plane, std::int64_t planes,
                                       const T* x, Fetch fetch_next, Deviation deviation,
                                       Ahead = {}) {
  return plane_sums<T>(
      part, plane, planes,
      [&](std::int64_t at, auto mask) BRN_INLINED {
        if constexpr (Ahead::value) fetch(x + at + part.ahead);
        const Lanes<T> d = mask(deviation(load(x + at)));
        return LaneSums<T>::of(d, d);
      },
      fetch_next);
}

// Of a channel of few vectors, in two sweeps: the second one finds them in the L1.
template <bool kAhead, typename T>
BRN_LANES SharedMoments<RealOf<T>, RealOf<T>> brief_moments(const Part& part, std::int64_t plane,
                                                            std::int64_t planes, const T* x,
                                                            Lanes<T> pivot) {
  using Real = RealOf<T>;
  const Real count = static_cast<Real>(part.end);
  const bool apart = has_planes_apart(part);
  const LaneSums<T> shifted = plane_deviations(
      part, plane, planes, x,
      [&](std::int64_t next) BRN_INLINED {
        if (apart) fetch_plane(part, x + next);
      },
      [&](Lanes<T> v) BRN_INLINED { return v - pivot; }, std::bool_constant<kAhead>{});
  const Real mean = sum_across(shifted.values) / count;
  const Lanes<T> means = Lanes<T>::of(mean);
  const LaneSums<T> deviations = plane_deviations(
      part, plane, planes, x, [](std::int64_t) {},
      [&](Lanes<T> v) BRN_INLINED { return (v - pivot) - means; });
  return {count, mean, sum_across(deviations.products)};
}

// x of the slab's w-th channel at position 0. The part that begins there keeps it.
template <typename T>
BRN_LANES RealOf<T> take_pivot(const Part& part, std::int64_t w, const T* x, RealOf<T>* pivot) {
  const RealOf<T> x0 = to_real(x[part.first + w * part.plane]);
  if (part.begin == 0) pivot[w] = x0;
  return x0;
}

// The mean of the first vectors of its first plane instead, for channels of many elements: what the
// mean is off the pivot is rounded at the end.
template <typename T>
BRN_LANES RealOf<T> take_mean_pivot(const Part& part, std::int64_t w, const T* x,
                                    RealOf<T>* pivot) {
  using Real = RealOf<T>;
  constexpr std::int64_t kStep = kLanes<T>;
  constexpr std::int64_t kMost = 4;
  const T* first = x + part.first + w * part.plane;
  const std::int64_t whole = part.plane / kStep;
  const std::int64_t vectors = whole < kMost ? whole : kMost;
  Real mean = to_real(*first);
  if (vectors > 0) {
    const Lanes<T> x0 = Lanes<T>::of(mean);
    Lanes<T> sum = load(first) - x0;
    for (std::int64_t k = 1; k < vectors; ++k) sum += load(first + k * kStep) - x0;
    mean += sum_across(sum) / static_cast<Real>(vectors * kStep);
  }
  if (part.begin == 0) pivot[w] = mean;
  return mean;
}

// Of all channels of a part that is brief. A loop of its own has registers enough: forward of (1,
// 2048, 7, 7) float32, 73 us, and 76 with the other channels' in it.
template <bool kAhead, typename T>
BRN_LANES void brief_channel_moments(const Part& part, const T* x, RealOf<T>* pivot,
                                     RealOf<T>* mean, RealOf<T>* m2) {
  const std::int64_t planes = part.end / part.plane;
  for (std::int64_t w = 0; w < part.width; ++w) {
    const Lanes<T> pivots = Lanes<T>::of(take_pivot(part, w, x, pivot));
    const auto moments = brief_moments<kAhead>(part, begin_of(part, w), planes, x, pivots);
    mean[w] = moments.mean;
    m2[w] = moments.m2;
  }
}
template <typename T>
void brief_channel_moments(const Part& part, const T* x, RealOf<T>* pivot, RealOf<T>* mean,
                           RealOf<T>* m2) {
  part.ahead != 0 && !has_planes_apart(part)
      ? brief_channel_moments<true>(part, x, pivot, mean, m2)
      : brief_channel_moments<false>(part, x, pivot, mean, m2);
}

template <Fetched kFetched, typename T>
BRN_LANES SharedMoments<RealOf<T>, RealOf<T>> channel_moments(const Part& part, std::int64_t w,
                                                              const T* x, RealOf<T> pivot) {
  const Lanes<T> pivots = Lanes<T>::of(pivot);
  ChannelMoments<T> moments(pivots, first_vector(part, w, x));
  const auto add = [&](std::int64_t at, std::int64_t length, std::int64_t next) BRN_INLINED {
    fetch_plane(part, x + at + part.plane);
    const std::int64_t fetched = kFetched == Fetched::kAhead ? part.ahead : next;
    moments.template add_run<kFetched>(x + at, length, fetched);
  };
  for_each_run(part, w, add);
  if (moments.chains.vectors > 0) moments.close();
  return moments.across(static_cast<RealOf<T>>(part.end - part.begin));
}

}  // namespace
}  // namespace brn::cpu
