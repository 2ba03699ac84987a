// The writing sweeps of kChannelsFirst through the caches; those past them are in streams.h.
#pragma once

#include "accumulate.h"
#include "isa.h"
#include "lanes.h"
#include "runs.h"

#include <cstdint>

namespace brn::cpu {
namespace {

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

template <typename T>
BRN_LANES Affine<Lanes<T>> affine_of(const Affines<RealOf<T>>& a, std::int64_t w) {
  return {Lanes<T>::of(a.centre[w]), Lanes<T>::of(a.scale[w]), Lanes<T>::of(a.shift[w])};
}
template <typename T>
BRN_LANES Projection<Lanes<T>> projection_of(const Projections<RealOf<T>>& p, std::int64_t w) {
  return {Lanes<T>::of(p.mean_g[w]), Lanes<T>::of(p.slope[w]), Lanes<T>::of(p.scale[w])};
}

// A run. `next` elements further on another is written; `ahead` elements further on lies the next
// slab, and is fetched, if that is not 0. Part::ahead is another matter: see Fetched.
template <Fetched kFetched, typename T>
BRN_LANES void normalise_run(const Part& part, const Affine<Lanes<T>>& affine, const T* x, T* y,
                             std::int64_t at, std::int64_t length, std::int64_t next,
                             std::int64_t ahead) {
  const auto whole = [&](std::int64_t i) BRN_INLINED {
    if constexpr (kFetched == Fetched::kNextPlane) {
      fetch<true>(y + i + next);
      if (ahead != 0) fetch(x + i + ahead);
    }
    if constexpr (kFetched == Fetched::kAhead) fetch(x + i + part.ahead);
    store(y + i, apply(affine, load(x + i)));
  };
  const auto rest = [&](std::int64_t i, std::int64_t n) {
    store_first(y + i, apply(affine, load_first(x + i, n)), n);
  };
  fetch_plane<true>(part, y + at + part.plane);
  if (ahead != 0) fetch_plane(part, x + at + ahead);
  cover<T>(at, length, whole, rest);
}

template <Fetched kFetched, typename T>
BRN_LANES void channel_normalise(const Part& part, std::int64_t w, const T* x,
                                 const Affines<RealOf<T>>& a, T* y) {
  const Affine<Lanes<T>> affine = affine_of<T>(a, w);
  const std::int64_t ahead = fetched_ahead_of_writing<T>(part);
  for_each_run(part, w, [&](std::int64_t at, std::int64_t length, std::int64_t next) BRN_INLINED {
    normalise_run<kFetched>(part, affine, x, y, at, length, next, ahead);
  });
}

template <Fetched kFetched, typename T>
BRN_LANES void project_run(const Part& part, Lanes<T> centre,
                           const Projection<Lanes<T>>& projection, const T* dy, const T* x, T* dx,
                           std::int64_t at, std::int64_t length, std::int64_t next,
                           std::int64_t ahead) {
  const auto whole = [&](std::int64_t i) BRN_INLINED {
    if constexpr (kFetched == Fetched::kNextPlane) {
      fetch<true>(dx + i + next);
      if (ahead != 0) {
        fetch(dy + i + ahead);
        fetch(x + i + ahead);
      }
    }
    if constexpr (kFetched == Fetched::kAhead) {
      fetch(dy + i + part.ahead);
      fetch(x + i + part.ahead);
    }
    store(dx + i, apply(projection, load(dy + i), load(x + i) - centre));
  };
  const auto rest = [&](std::int64_t i, std::int64_t n) {
    const Lanes<T> x_minus_centre = load_first(x + i, n) - centre;
    store_first(dx + i, apply(projection, load_first(dy + i, n), x_minus_centre), n);
  };
  fetch_plane<true>(part, dx + at + part.plane);
  if (ahead != 0) {
    fetch_plane(part, dy + at + ahead);
    fetch_plane(part, x + at + ahead);
  }
  cover<T>(at, length, whole, rest);
}

template <Fetched kFetched, typename T>
BRN_LANES void channel_project(const Part& part, std::int64_t w, const T* dy, const T* x,
                               const RealOf<T>* centres, const Projections<RealOf<T>>& p, T* dx) {
  const Lanes<T> centre = Lanes<T>::of(centres[w]);
  const Projection<Lanes<T>> projection = projection_of<T>(p, w);
  const std::int64_t ahead = fetched_ahead_of_writing<T>(part);
  for_each_run(part, w, [&](std::int64_t at, std::int64_t length, std::int64_t next) BRN_INLINED {
    project_run<kFetched>(part, centre, projection, dy, x, dx, at, length, next, ahead);
  });
}

}  // namespace
}  // namespace brn::cpu
