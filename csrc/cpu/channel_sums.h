// Sums of dy and of dy * (x - centre) of a channel of kChannelsFirst.
#pragma once

#include "accumulate.h"
#include "across.h"
#include "chains.h"
#include "isa.h"
#include "lanes.h"
#include "runs.h"

#include <cstdint>
#include <cstring>

namespace brn::cpu {
namespace {

template <typename T>
struct ChannelSums {
  const Lanes<T> centre;
  ExactSum<Lanes<T>> g{};
  ExactSum<Lanes<T>> gx{};
  Chains<T> chains{};

  BRN_LANES void close() {
    const LaneSums<T> sums = chains.take();
    g.add(sums.values);
    gx.add(sums.products);
  }
  template <Fetched kFetched>
  BRN_LANES void add_run(const T* dy, const T* x, std::int64_t length, std::int64_t next) {
    constexpr int kStep = kLanes<T>;
    chains.add_run(
        length,
        [&](std::int64_t i)
            BRN_INLINED { return LaneSums<T>::of(load(dy + i), load(x + i) - centre); },
        [&](std::int64_t i) BRN_INLINED {
          if (length >= kStep) {
            const Mask<T> mask = last_elements<T>(length - i);
            return LaneSums<T>::of(mask(load(dy + length - kStep)),
                                   mask(load(x + length - kStep) - centre));
          }
          const Mask<T> mask = first_elements<T>(length);
          return LaneSums<T>::of(load_first(dy, length), mask(load_first(x, length) - centre));
        },
        [&](std::int64_t i) BRN_INLINED {
          if constexpr (kFetched != Fetched::kNothing) {
            fetch(dy + i + next);
            fetch(x + i + next);
          }
        },
        [&]() BRN_INLINED { close(); });
  }
};

// The sum of all lanes.
template <typename T>
BRN_LANES double sum_in_double(Lanes<T> lanes) {
  using Real = RealOf<T>;
  constexpr int kPieces =
      sizeof(double) / sizeof(Real);  // each as many Reals as a vector of doubles
  using Piece = typename VectorOf<Real, BRN_VECTOR_BYTES / kPieces>::Type;
  Vector<double> total{};
  for (const Vector<Real>& v : lanes.v) {
    Piece pieces[kPieces];
    std::memcpy(pieces, &v, sizeof(pieces));
    for (const Piece& piece : pieces) total += __builtin_convertvector(piece, Vector<double>);
  }
  return sum_across<double, BRN_VECTOR_BYTES>(total);
}
// The error of an infinite sum is NaN, and is none.
template <typename T>
BRN_LANES double sum_in_double(const ExactSum<Lanes<T>>& exact) {
  Lanes<T> error = exact.error;
  for (auto& v : error.v) v = v == v ? v : Vector<RealOf<T>>{};
  return sum_in_double(exact.sum) + sum_in_double(error);
}

// fetch_next(element) is called before each plane (see plane_sums()); kAhead: what lies Part::ahead
// further on is fetched.
template <bool kAhead = false, typename T, typename Fetch>
BRN_LANES LaneSums<T> plane_products(const Part& part, std::int64_t plane, std::int64_t planes,
                                     const T* dy, const T* x, Lanes<T> centre, Fetch fetch_next) {
  return plane_sums<T>(
      part, plane, planes,
      [&](std::int64_t at, auto mask) BRN_INLINED {
        if constexpr (kAhead) {
          fetch(dy + at + part.ahead);
          fetch(x + at + part.ahead);
        }
        return LaneSums<T>::of(mask(load(dy + at)), mask(load(x + at) - centre));
      },
      fetch_next);
}

template <typename Real>
BRN_LANES void keep_sums(const SumRows<Real>& rows, std::int64_t w, double g, double gx) {
  rows.g[w] = static_cast<Real>(g);
  rows.g_error[w] = static_cast<Real>(g - static_cast<double>(rows.g[w]));
  rows.gx[w] = static_cast<Real>(gx);
  rows.gx_error[w] = static_cast<Real>(gx - static_cast<double>(rows.gx[w]));
}

// Of all channels of a part that is brief.
template <bool kAhead, typename T>
BRN_LANES void brief_channel_sums(const Part& part, const T* dy, const T* x,
                                  const RealOf<T>* centres, const SumRows<RealOf<T>>& rows) {
  using Sum = ExactSum<Lanes<RealOf<T>>>;
  constexpr int kTogether = kTogetherAcross<T>;
  const std::int64_t planes = part.end / part.plane;
  const bool apart = has_planes_apart(part);
  const auto fetch_next = [&](std::int64_t next) BRN_INLINED {
    if (!apart) return;
    fetch_plane(part, dy + next);
    fetch_plane(part, x + next);
  };
  for (std::int64_t w = 0; w < part.width; w += kTogether) {
    Lanes<RealOf<T>> g[kTogether];
    Lanes<RealOf<T>> gx[kTogether];
    const std::int64_t count = part.width - w < kTogether ? part.width - w : kTogether;
    for (std::int64_t k = 0; k < count; ++k) {
      const LaneSums<T> sums = plane_products<kAhead>(part, begin_of(part, w + k), planes, dy, x,
                                                      Lanes<T>::of(centres[w + k]), fetch_next);
      g[k] = in_one_vector(sums.values);
      gx[k] = in_one_vector(sums.products);
    }
    for (std::int64_t k = count; k < kTogether; ++k) g[k] = gx[k] = {};
    const Sum all_g = exact_sums_across(g);
    const Sum all_gx = exact_sums_across(gx);
    store(rows.g + w, all_g.sum);
    store(rows.g_error + w, all_g.error);
    store(rows.gx + w, all_gx.sum);
    store(rows.gx_error + w, all_gx.error);
  }
}

template <typename T>
void brief_channel_sums(const Part& part, const T* dy, const T* x, const RealOf<T>* centres,
                        const SumRows<RealOf<T>>& rows) {
  part.ahead != 0 && !has_planes_apart(part)
      ? brief_channel_sums<true>(part, dy, x, centres, rows)
      : brief_channel_sums<false>(part, dy, x, centres, rows);
}

template <Fetched kFetched, typename T>
BRN_LANES void channel_sums(const Part& part, std::int64_t w, const T* dy, const T* x,
                            const RealOf<T>* centres, const SumRows<RealOf<T>>& rows) {
  const Lanes<T> centre = Lanes<T>::of(centres[w]);
  ChannelSums<T> sums{centre};
  const auto add = [&](std::int64_t at, std::int64_t length, std::int64_t next) BRN_INLINED {
    fetch_plane(part, dy + at + part.plane);
    fetch_plane(part, x + at + part.plane);
    const std::int64_t fetched = kFetched == Fetched::kAhead ? part.ahead : next;
    sums.template add_run<kFetched>(dy + at, x + at, length, fetched);
  };
  for_each_run(part, w, add);
  if (sums.chains.vectors > 0) sums.close();
  keep_sums(rows, w, sum_in_double(sums.g), sum_in_double(sums.gx));
}

}  // namespace
}  // namespace brn::cpu
