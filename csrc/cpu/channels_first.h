// The writing sweeps of kChannelsFirst.
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

constexpr std::int64_t kLineBytes = 64;
template <typename T>
constexpr std::int64_t kLine = kLineBytes / static_cast<std::int64_t>(sizeof(T));

// Elements from the beginning of its line.
template <typename T>
BRN_LANES std::int64_t within_line(const T* y) {
  return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(y) % kLineBytes / sizeof(T));
}

// Whether it pays to write a run past the caches: of six lines that begin anywhere, (32, 1024, 14,
// 14) bfloat16, it does not (Zen 5, forward and backward 0.98 and 0.90), of seven and a half, (32,
// 1024, 11, 11) float32, it does (1.15 and 1.05).
template <typename T>
BRN_LANES bool passes_caches(const Part& part, const T* y, std::int64_t length) {
  const bool whole_lines = length % kLine<T> == 0 && within_line(y) == 0;
  return part.streamed && (whole_lines || length >= 7 * kLine<T>);
}

// The same for such a run: streamed(element) for the vectors of whole lines. Lines that another run
// shares, and the next ones, which the vectors over them reach into, go through the caches. Against
// all of them going there, Zen 5, one thread, forward, backward and inference: (32, 1024, 14, 14)
// float32 1.10, 1.08 and 1.13 times as fast, (8, 512, 35, 35) 1.30, 1.19 and 1.21, (64, 128, 28,
// 28) bfloat16 1.19, 1.21 and 1.23.
template <typename T, typename F, typename Streamed>
BRN_LANES void cover_past_caches(const T* y, std::int64_t at, std::int64_t length, F whole,
                                 Streamed streamed) {
  constexpr int kStep = kLanes<T>;
  const std::int64_t end = at + length;
  std::int64_t i = at;
  if (const std::int64_t within = within_line(y + at)) {
    const std::int64_t next = at + kLine<T> - within;
    for (; i < next; i += kStep) whole(i);
    for (i = next; i < next + kLine<T>; i += kStep) whole(i);
  }
  const auto line = [&]() BRN_INLINED {
    for (const std::int64_t last = i + kLine<T>; i < last; i += kStep) streamed(i);
  };
  while (i + kLine<T> + kStep <= end) line();
  if (i + kLine<T> == end) return line();
  for (; i + kStep <= end; i += kStep) whole(i);
  if (i < end) whole(end - kStep);
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
  const auto streamed = [&](std::int64_t i) BRN_INLINED {
    if constexpr (kFetched == Fetched::kAhead) fetch(x + i + part.ahead);
    stream(y + i, apply(affine, load(x + i)));
  };
  const auto rest = [&](std::int64_t i, std::int64_t n) {
    store_first(y + i, apply(affine, load_first(x + i, n)), n);
  };
  if (passes_caches(part, y + at, length)) {
    return cover_past_caches(y, at, length, whole, streamed);
  }
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
  const auto projected = [&](std::int64_t i) BRN_INLINED {
    return apply(projection, load(dy + i), load(x + i) - centre);
  };
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
    store(dx + i, projected(i));
  };
  const auto streamed = [&](std::int64_t i) BRN_INLINED { stream(dx + i, projected(i)); };
  const auto rest = [&](std::int64_t i, std::int64_t n) {
    const Lanes<T> x_minus_centre = load_first(x + i, n) - centre;
    store_first(dx + i, apply(projection, load_first(dy + i, n), x_minus_centre), n);
  };
  if (passes_caches(part, dx + at, length)) {
    return cover_past_caches(dx, at, length, whole, streamed);
  }
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
