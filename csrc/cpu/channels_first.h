// The sweeps of kChannelsFirst. What a part has of one plane is a run, and all of it belongs to one
// channel: lanes are added up in the end.
#pragma once

#include "../core/math.h"
#include "accumulate.h"
#include "isa.h"
#include "lanes.h"

#include <cstdint>
#include <cstring>

namespace brn::cpu {
namespace {

// The element at which the slab's w-th channel has a position.
BRN_LANES std::int64_t element_at(const Part& part, std::int64_t w, std::int64_t position) {
  const std::int64_t plane = position < part.plane ? 0 : position / part.plane;
  return part.first + w * part.plane + plane * part.stride + position - plane * part.plane;
}

// Calls f(element, length, next) for the runs of the slab's w-th channel at the positions [begin,
// end). `next` elements further on lies what is read after it: the channel's next plane, or the
// next channel.
template <typename F>
BRN_LANES void for_each_run(const Part& part, std::int64_t w, std::int64_t begin, std::int64_t end,
                            F f) {
  std::int64_t s = begin < part.plane ? begin : begin % part.plane;
  std::int64_t plane = element_at(part, w, begin) - s;
  for (std::int64_t left = end - begin; left > 0; plane += part.stride, s = 0) {
    const std::int64_t length = part.plane - s < left ? part.plane - s : left;
    left -= length;
    const bool more = left > 0 || end < part.end;
    f(plane + s, length, more ? part.stride : element_at(part, w + 1, part.begin) - (plane + s));
  }
}

// What comes next lies apart from what is at hand, and prefetchers do not see it coming. Of planes
// of some kilobytes, the same place of the next one is fetched, vector by vector; of shorter ones,
// all of the next channel's plane, which is a neighbour; longer ones need no help.
// GB/s of x or of dy and x out of memory, one thread, float32, without and with it: (32, 64, 56,
// 56), moments 14 and 18, sums 21 and 27; (32, 128, 28, 28), 13 and 17, 16 and 25.
template <typename T>
constexpr std::int64_t kShortPlane = 2048 / sizeof(T);
template <typename T>
constexpr std::int64_t kLongPlane = 16384 / sizeof(T);

template <typename T>
BRN_LANES bool is_fetched_along(const Part& part) {
  return part.plane > kShortPlane<T> && part.plane <= kLongPlane<T>;
}
template <bool kToWrite = false, typename T>
BRN_LANES void fetch_neighbour(const Part& part, const T* plane) {
  constexpr std::int64_t kLine = 64 / sizeof(T);
  if (part.plane > kShortPlane<T>) return;
  for (std::int64_t i = 0; i < part.plane; i += kLine) fetch<kToWrite>(plane + part.plane + i);
}

// Positions that are read twice for their moments: 256 vectors, so that a sum in four chains adds
// 64 of them to each, and 16 KB at the most, half of an L1.
template <typename T>
constexpr std::int64_t kTile = 256 * kLanes<T>;

// The sum of f(lanes of x) over a run. kAlong: what lies `next` elements further on is fetched.
template <bool kAlong, typename T, typename F>
BRN_LANES Lanes<T> sum_over_run(const T* x, std::int64_t length, std::int64_t next, F f) {
  constexpr int kStep = kLanes<T>;
  Lanes<T> sums[4] = {};
  std::int64_t i = 0;
  for (; i + 4 * kStep <= length; i += 4 * kStep) {
    if constexpr (kAlong) {
      for (int k = 0; k < 4; ++k) fetch(x + i + k * kStep + next);
    }
    for (int k = 0; k < 4; ++k) sums[k] += f(load(x + i + k * kStep));
  }
  for (; i + kStep <= length; i += kStep) sums[0] += f(load(x + i));
  if (i < length) {
    sums[1] += length >= kStep ? last_elements<T>(length - i)(f(load(x + length - kStep)))
                               : first_elements<T>(length - i)(f(load_first(x, length)));
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <bool kAlong, typename T>
BRN_LANES SharedMoments<RealOf<T>, RealOf<T>> channel_moments(const Part& part, std::int64_t w,
                                                              const T* x, RealOf<T> pivot) {
  using Real = RealOf<T>;
  const Lanes<T> pivots = Lanes<T>::of(pivot);
  SharedMoments<Real, Real> moments{0, 0, 0};
  for (std::int64_t begin = part.begin; begin < part.end; begin += kTile<T>) {
    const std::int64_t end = begin + kTile<T> < part.end ? begin + kTile<T> : part.end;
    const Real count = static_cast<Real>(end - begin);
    const auto shifted = [&](Lanes<T> v) BRN_INLINED { return v - pivots; };
    Lanes<T> sum{};
    for_each_run(part, w, begin, end,
                 [&](std::int64_t at, std::int64_t length, std::int64_t next) BRN_INLINED {
                   fetch_neighbour(part, x + at);
                   sum += sum_over_run<kAlong>(x + at, length, next, shifted);
                 });
    const Real mean = sum_across(sum) / count;
    const auto squared_deviation = [&](Lanes<T> v) BRN_INLINED {
      const Lanes<T> deviation = (v - pivots) - Lanes<T>::of(mean);
      return deviation * deviation;
    };
    Lanes<T> m2{};
    for_each_run(part, w, begin, end,
                 [&](std::int64_t at, std::int64_t length, std::int64_t) BRN_INLINED {
                   m2 += sum_over_run<false>(x + at, length, 0, squared_deviation);
                 });
    const SharedMoments<Real, Real> tile{count, mean, sum_across(m2)};
    moments = begin == part.begin ? tile : merge(moments, tile);
  }
  return moments;
}

// A running sum in blocks of kBlock vectors, each in four chains, so that few additions stand
// between an element and the exact total.
template <typename T>
struct ChannelSums {
  static constexpr int kBlock = 64;

  const Lanes<T> centre;
  ExactSum<Lanes<T>> g{};
  ExactSum<Lanes<T>> gx{};
  LaneSums<T> chains[4] = {};
  int vectors = 0;  // in the chains

  BRN_LANES void close() {
    chains[0] += chains[1];
    chains[2] += chains[3];
    chains[0] += chains[2];
    g.add(chains[0].g);
    gx.add(chains[0].gx);
    for (LaneSums<T>& chain : chains) chain = {};
    vectors = 0;
  }
  template <bool kAlong>
  BRN_LANES void add_run(const T* dy, const T* x, std::int64_t length, std::int64_t next) {
    constexpr int kStep = kLanes<T>;
    std::int64_t i = 0;
    while (i + 4 * kStep <= length) {
      const std::int64_t room = i + (kBlock - vectors) * kStep;
      const std::int64_t end = room < length ? room : length;
      const std::int64_t begin = i;
      LaneSums<T> sums[4] = {chains[0], chains[1], chains[2], chains[3]};
      for (; i + 4 * kStep <= end; i += 4 * kStep) {
        if constexpr (kAlong) {
          for (int k = 0; k < 4; ++k) {
            fetch(dy + i + k * kStep + next);
            fetch(x + i + k * kStep + next);
          }
        }
        for (int k = 0; k < 4; ++k) {
          const Lanes<T> v = load(dy + i + k * kStep);
          sums[k] += {v, v * (load(x + i + k * kStep) - centre)};
        }
      }
      for (int k = 0; k < 4; ++k) chains[k] = sums[k];
      vectors += static_cast<int>((i - begin) / kStep);
      if (vectors > kBlock - 4) close();
    }
    for (; i + kStep <= length; i += kStep, ++vectors) add(0, load(dy + i), load(x + i) - centre);
    if (i < length) {
      if (length >= kStep) {
        const Mask<T> mask = last_elements<T>(length - i);
        add(1, mask(load(dy + length - kStep)), mask(load(x + length - kStep) - centre));
      } else {
        const Mask<T> mask = first_elements<T>(length);
        add(1, load_first(dy, length), mask(load_first(x, length) - centre));
      }
      ++vectors;
    }
    if (vectors > kBlock - 4) close();
  }
  BRN_LANES void add(int chain, Lanes<T> v, Lanes<T> x_minus_centre) {
    chains[chain] += {v, v * x_minus_centre};
  }
};

// Sum and error of all lanes together.
template <typename T>
BRN_LANES ExactSum<RealOf<T>> across(const ExactSum<Lanes<T>>& lanes) {
  using Real = RealOf<T>;
  constexpr int kPieces =
      sizeof(double) / sizeof(Real);  // each as many Reals as a vector of doubles
  using Piece = typename VectorOf<Real, BRN_VECTOR_BYTES / kPieces>::Type;
  Vector<double> total{};
  for (int i = 0; i < Lanes<T>::kVectors; ++i) {
    const Vector<Real> made = lanes.error.v[i];
    const Vector<Real> error =
        made == made ? made : Vector<Real>{};  // that of an infinite sum is NaN
    Piece sums[kPieces];
    Piece errors[kPieces];
    std::memcpy(sums, &lanes.sum.v[i], sizeof(sums));
    std::memcpy(errors, &error, sizeof(errors));
    for (int k = 0; k < kPieces; ++k) {
      total += __builtin_convertvector(sums[k], Vector<double>) +
               __builtin_convertvector(errors[k], Vector<double>);
    }
  }
  const double sum = sum_across<double, BRN_VECTOR_BYTES>(total);
  return {static_cast<Real>(sum),
          static_cast<Real>(sum - static_cast<double>(static_cast<Real>(sum)))};
}

template <bool kAlong, typename T>
BRN_LANES void channel_sums(const Part& part, std::int64_t w, const T* dy, const T* x,
                            const RealOf<T>* centres, const SumRows<RealOf<T>>& rows) {
  using Real = RealOf<T>;
  ChannelSums<T> sums{Lanes<T>::of(centres[w])};
  const auto add = [&](std::int64_t at, std::int64_t length, std::int64_t next) BRN_INLINED {
    fetch_neighbour(part, dy + at);
    fetch_neighbour(part, x + at);
    sums.template add_run<kAlong>(dy + at, x + at, length, next);
  };
  for_each_run(part, w, part.begin, part.end, add);
  if (sums.vectors > 0) sums.close();
  const ExactSum<Real> g = across(sums.g);
  const ExactSum<Real> gx = across(sums.gx);
  rows.g[w] = g.sum;
  rows.g_error[w] = g.error;
  rows.gx[w] = gx.sum;
  rows.gx_error[w] = gx.error;
}

// Calls whole(element) for vectors that cover a run, the last of them over part of the one before
// it; a run shorter than a vector is left to rest(element, length).
template <typename T, typename F, typename Rest>
BRN_LANES void cover(std::int64_t at, std::int64_t length, F whole, Rest rest) {
  constexpr int kStep = kLanes<T>;
  const std::int64_t end = at + length;
  if (length < kStep) return rest(at, length);
  for (; at + 4 * kStep <= end; at += 4 * kStep) {
    for (int k = 0; k < 4; ++k) whole(at + k * kStep);
  }
  for (; at + kStep <= end; at += kStep) whole(at);
  if (at < end) whole(end - kStep);
}

template <bool kAlong, typename T>
BRN_LANES void channel_normalise(const Part& part, std::int64_t w, const T* x,
                                 const Affines<RealOf<T>>& a, T* y) {
  const CentredAffine<Lanes<T>> affine{Lanes<T>::of(a.centre[w]), Lanes<T>::of(a.scale[w]),
                                       Lanes<T>::of(a.shift[w])};
  const auto normalise = [&](std::int64_t at, std::int64_t length, std::int64_t next) BRN_INLINED {
    const auto whole = [&](std::int64_t i) BRN_INLINED {
      if constexpr (kAlong) fetch<true>(y + i + next);
      store(y + i, apply(affine, load(x + i)));
    };
    const auto streamed = [&](std::int64_t i)
                              BRN_INLINED { stream(y + i, apply(affine, load(x + i))); };
    const auto rest = [&](std::int64_t i, std::int64_t n) {
      store_first(y + i, apply(affine, load_first(x + i, n)), n);
    };
    if (part.streamed && is_aligned(y + at, length)) {
      return cover<T>(at, length, streamed, rest);
    }
    fetch_neighbour<true>(part, y + at);
    cover<T>(at, length, whole, rest);
  };
  for_each_run(part, w, part.begin, part.end, normalise);
}

template <bool kAlong, typename T>
BRN_LANES void channel_project(const Part& part, std::int64_t w, const T* dy, const T* x,
                               const RealOf<T>* centres, const Projections<RealOf<T>>& p, T* dx) {
  const Lanes<T> centre = Lanes<T>::of(centres[w]);
  const Projection<Lanes<T>> projection{Lanes<T>::of(p.mean_g[w]), Lanes<T>::of(p.slope[w]),
                                        Lanes<T>::of(p.scale[w])};
  const auto project = [&](std::int64_t at, std::int64_t length, std::int64_t next) BRN_INLINED {
    const auto whole = [&](std::int64_t i) BRN_INLINED {
      if constexpr (kAlong) fetch<true>(dx + i + next);
      store(dx + i, apply(projection, load(dy + i), load(x + i) - centre));
    };
    const auto streamed = [&](std::int64_t i) BRN_INLINED {
      stream(dx + i, apply(projection, load(dy + i), load(x + i) - centre));
    };
    const auto rest = [&](std::int64_t i, std::int64_t n) {
      const Lanes<T> x_minus_centre = load_first(x + i, n) - centre;
      store_first(dx + i, apply(projection, load_first(dy + i, n), x_minus_centre), n);
    };
    if (part.streamed && is_aligned(dx + at, length)) {
      return cover<T>(at, length, streamed, rest);
    }
    fetch_neighbour<true>(part, dx + at);
    cover<T>(at, length, whole, rest);
  };
  for_each_run(part, w, part.begin, part.end, project);
}

}  // namespace
}  // namespace brn::cpu
