// Moments of a channel of kChannelsFirst.
#pragma once

#include "accumulate.h"
#include "centre.h"
#include "chains.h"
#include "isa.h"
#include "lanes.h"
#include "runs.h"

#include <cstdint>

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
  Lanes<T> mean;  // of x - pivot
  Centre<Lanes<T>> centre;
  Lanes<T> m2;
  Lanes<T> count;

  BlockMoments() = default;
  BRN_LANES BlockMoments(Lanes<T> pivots, Lanes<T> first)
      : pivot(pivots), mean(first - pivots), centre(centre_of(pivot, mean)), m2{}, count{} {}

  // The centre becomes the mean of `made` elements of each lane, which deviate so from what it was.
  BRN_LANES void recentre(Lanes<T> made, LaneSums<T> sums) {
    mean += (sums.values - made * centre.residue) / made;
    centre = centre_of(pivot, mean);
  }

  // What `made` elements of each lane come to around the centre, and their squares.
  BRN_LANES void add_block(Lanes<T> made, LaneSums<T> sums) {
    const Lanes<T> d = sums.values - made * centre.residue;  // around pivot + mean
    const Lanes<T> dd = sums.products - (sums.values + d) * centre.residue;
    count += made;
    const Lanes<T> step = d / at_least_one(count);
    mean += step;
    m2 += dd - d * step;
    centre = centre_of(pivot, mean);
  }

  BRN_LANES SharedMoments<Real, Real> across(Real n) const {
    const Real total = sum_across(count * mean) / n;
    const Lanes<T> apart = mean - Lanes<T>::of(total);
    return {n, total, sum_across(m2 + count * apart * apart)};
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

  template <bool kAlong>
  BRN_LANES void add_run(const T* x, std::int64_t length, std::int64_t next) {
    constexpr int kStep = kLanes<T>;
    const auto sums_of = [](Lanes<T> d) BRN_INLINED { return LaneSums<T>::of(d, d); };
    chains.add_run(
        length, [&](std::int64_t i) BRN_INLINED { return sums_of(load(x + i) - centre.centre); },
        [&](std::int64_t i) BRN_INLINED {
          const Mask<T> mask =
              length >= kStep ? last_elements<T>(length - i) : first_elements<T>(length);
          in_tails += mask(Lanes<T>::of(1));
          const Lanes<T> v = length >= kStep ? load(x + length - kStep) : load_first(x, length);
          return sums_of(mask(v - centre.centre));
        },
        [&](std::int64_t i) BRN_INLINED {
          if constexpr (kAlong) fetch(x + i + next);
        },
        [&]() BRN_INLINED { close(); });
  }
};

// Sums of deviations(v) over vectors v of x, and of their squares.
template <typename T, typename Fetch, typename Deviation>
BRN_LANES LaneSums<T> plane_deviations(const Part& part, std::int64_t plane, std::int64_t planes,
                                       const T* x, Fetch fetch, Deviation deviation) {
  return plane_sums<T>(
      part, plane, planes,
      [&](std::int64_t at, auto mask) BRN_INLINED {
        const Lanes<T> d = mask(deviation(load(x + at)));
        return LaneSums<T>::of(d, d);
      },
      fetch);
}

// Of a channel of few vectors, in two sweeps: the second one finds them in the L1.
template <typename T>
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
      [&](Lanes<T> v) BRN_INLINED { return v - pivot; });
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

// Of all channels of a part that is brief. A loop of its own has registers enough: forward of (1,
// 2048, 7, 7) float32, 73 us, and 76 with the other channels' in it.
template <typename T>
void brief_channel_moments(const Part& part, const T* x, RealOf<T>* pivot, RealOf<T>* mean,
                           RealOf<T>* m2) {
  const std::int64_t planes = part.end / part.plane;
  for (std::int64_t w = 0; w < part.width; ++w) {
    const Lanes<T> pivots = Lanes<T>::of(take_pivot(part, w, x, pivot));
    const auto moments = brief_moments(part, begin_of(part, w), planes, x, pivots);
    mean[w] = moments.mean;
    m2[w] = moments.m2;
  }
}

template <bool kAlong, typename T>
BRN_LANES SharedMoments<RealOf<T>, RealOf<T>> channel_moments(const Part& part, std::int64_t w,
                                                              const T* x, RealOf<T> pivot) {
  const Lanes<T> pivots = Lanes<T>::of(pivot);
  ChannelMoments<T> moments(pivots, first_vector(part, w, x));
  const auto add = [&](std::int64_t at, std::int64_t length, std::int64_t next) BRN_INLINED {
    fetch_plane(part, x + at + part.plane);
    moments.template add_run<kAlong>(x + at, length, next);
  };
  for_each_run(part, w, add);
  if (moments.chains.vectors > 0) moments.close();
  return moments.across(static_cast<RealOf<T>>(part.end - part.begin));
}

}  // namespace
}  // namespace brn::cpu
