// The writing sweeps of kChannelsFirst where what is written goes past the caches, line by line.
//
// In memory a plane of one channel is followed by that of the next one. So the planes of a slab are
// written as they lie there, and a line that two channels share is made of both: that only the
// lines at both ends of such a stretch have to be read before they are written.
//
// Emerald Rapids, one thread, forward, backward and inference, against all through the caches: (32,
// 1024, 14, 14) float32 1.07, 1.04 and 1.26 times as fast; plane by plane, whose first and last
// lines go through the caches, 0.77, 0.76 and 0.69.
#pragma once

#include "accumulate.h"
#include "channels_first.h"
#include "isa.h"
#include "lanes.h"
#include "runs.h"

#include <cstdint>
#include <cstring>

namespace brn::cpu {
namespace {

constexpr std::int64_t kLineBytes = 64;
template <typename T>
constexpr std::int64_t kLine = kLineBytes / static_cast<std::int64_t>(sizeof(T));

// Elements to the next line.
template <typename T>
BRN_LANES std::int64_t to_line(const T* y) {
  const auto bytes = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(y) % kLineBytes);
  return (kLineBytes - bytes) % kLineBytes / static_cast<std::int64_t>(sizeof(T));
}

// What is written of an element, by pass: of(w) is what it takes of a channel, mixed() that of one
// where the mask is, of another elsewhere.
template <typename T>
struct Normalised {
  const T* x;
  const Affines<RealOf<T>>& affines;

  using Channel = Affine<Lanes<T>>;
  BRN_LANES Channel of(std::int64_t w) const { return affine_of<T>(affines, w); }
  static BRN_LANES Channel mixed(const Mask<T>& mask, const Channel& a, const Channel& b) {
    return {mask(a.centre, b.centre), mask(a.scale, b.scale), mask(a.shift, b.shift)};
  }
  BRN_LANES Lanes<T> at(const Channel& channel, std::int64_t i) const {
    return apply(channel, load(x + i));
  }
  BRN_LANES Lanes<T> at(const Channel& channel, std::int64_t i, std::int64_t count) const {
    return apply(channel, load_first(x + i, count));
  }
  BRN_LANES void fetch_at(std::int64_t i) const { fetch(x + i); }
};

template <typename T>
struct Projected {
  const T* dy;
  const T* x;
  const RealOf<T>* centres;
  const Projections<RealOf<T>>& projections;

  struct Channel {
    Lanes<T> centre;
    Projection<Lanes<T>> projection;
  };
  BRN_LANES Channel of(std::int64_t w) const {
    return {Lanes<T>::of(centres[w]), projection_of<T>(projections, w)};
  }
  static BRN_LANES Channel mixed(const Mask<T>& mask, const Channel& a, const Channel& b) {
    return {mask(a.centre, b.centre),
            {mask(a.projection.mean_g, b.projection.mean_g),
             mask(a.projection.slope, b.projection.slope),
             mask(a.projection.scale, b.projection.scale)}};
  }
  BRN_LANES Lanes<T> at(const Channel& channel, std::int64_t i) const {
    return apply(channel.projection, load(dy + i), load(x + i) - channel.centre);
  }
  BRN_LANES Lanes<T> at(const Channel& channel, std::int64_t i, std::int64_t count) const {
    const Lanes<T> x_minus_centre = load_first(x + i, count) - channel.centre;
    return apply(channel.projection, load_first(dy + i, count), x_minus_centre);
  }
  BRN_LANES void fetch_at(std::int64_t i) const {
    fetch(dy + i);
    fetch(x + i);
  }
};

// Fewer than 2 * kMost elements. One by one, backward of (32, 1024, 14, 14) float32 took 1.11 times
// as long (Emerald Rapids).
template <int kMost, typename T>
BRN_LANES void copy_some(const T* from, std::int64_t count, T* to) {
  if (count & kMost) std::memcpy(to, from, kMost * sizeof(T));
  if constexpr (kMost > 1)
    copy_some<kMost / 2>(from + (count & kMost), count, to + (count & kMost));
}

// [at, end): runs of `length` elements, of a line or more if they are several, of the channels from
// w on. What lies `ahead` elements further on is fetched, if that is not 0.
template <typename T, typename Pass>
BRN_LANES void stream_stretch(const Pass& pass, T* y, std::int64_t w, std::int64_t at,
                              std::int64_t length, std::int64_t end, std::int64_t ahead) {
  constexpr std::int64_t kStep = kLanes<T>;
  auto channel = pass.of(w);
  std::int64_t i = at;
  if (length < kLine<T>) {
    for (; i < end; i += kStep) {
      const std::int64_t count = end - i < kStep ? end - i : kStep;
      store_first(y + i, pass.at(channel, i, count), count);
    }
    return;
  }
  // Of the vector at `from`, which the channel has all of, [i, stop).
  const auto piece = [&](std::int64_t from, std::int64_t stop) BRN_INLINED {
    T vector[kStep];
    store(vector, pass.at(channel, from));
    copy_some<kStep / 2>(vector + (i - from), stop - i, y + i);
    i = stop;
  };
  std::int64_t channel_end = at + length;
  const std::int64_t first_line = at + to_line(y + at);
  for (; i + kStep <= first_line; i += kStep) store(y + i, pass.at(channel, i));
  if (i < first_line) piece(i, first_line);
  while (i + kLine<T> <= end) {
    for (; i + kLine<T> <= channel_end; i += kLine<T>) {
      if (ahead != 0) pass.fetch_at(i + ahead);
      for (std::int64_t k = 0; k < kLine<T>; k += kStep) stream(y + i + k, pass.at(channel, i + k));
    }
    if (i + kLine<T> > end) break;
    const auto next = pass.of(++w);
    for (std::int64_t k = 0; k < kLine<T>; k += kStep, i += kStep) {
      const std::int64_t left = channel_end > i ? channel_end - i : 0;
      const Mask<T> mask = first_elements<T>(left < kStep ? left : kStep);
      stream(y + i, pass.at(Pass::mixed(mask, channel, next), i));
    }
    channel = next;
    channel_end += length;
  }
  for (; i + kStep <= end; i += kStep) store(y + i, pass.at(channel, i));
  if (i < end) piece(end - kStep, end);
}

// Whether planes of all channels of a part are a stretch.
template <typename T>
BRN_LANES bool is_stretch(const Part& part) {
  return part.within == 0 && (part.end - part.begin) % part.plane == 0 && part.plane >= kLine<T>;
}

// Of stretches shorter than this the lines at both ends of the next one are fetched. Emerald
// Rapids, forward and backward, float32, with it against without: (256, 430, 11, 11), of 484
// bytes, 1.28 and 1.24 times as fast, (256, 256, 14, 14), of 784, 1.31 and 1.17, (16, 512, 27, 27),
// backward, of 5,832, 1.05; but (8, 512, 35, 35), of 29,400 and 14,700, 0.92 and 1.01.
template <typename T>
constexpr std::int64_t kShortStretch = 6144 / sizeof(T);

template <typename T, typename Pass>
BRN_LANES void stream_part(const Pass& pass, const Part& part, T* y, std::int64_t ahead) {
  const auto stretch = [&](std::int64_t w, std::int64_t at, std::int64_t length, std::int64_t end)
                           BRN_INLINED { stream_stretch(pass, y, w, at, length, end, ahead); };
  if (!is_stretch<T>(part)) {
    for (std::int64_t w = 0; w < part.width; ++w) {
      for_each_run(part, w, [&](std::int64_t at, std::int64_t length, std::int64_t) {
        stretch(w, at, length, at + length);
      });
    }
    return;
  }
  const std::int64_t whole = part.width * part.plane;
  const std::int64_t planes = (part.end - part.begin) / part.plane;
  const bool fetched = !part.in_order && whole < kShortStretch<T>;
  for (std::int64_t n = 0; n < planes; ++n) {
    const std::int64_t at = begin_of(part, 0) + n * part.stride;
    if (fetched) {
      fetch<true>(y + at + part.stride);
      fetch<true>(y + at + part.stride + whole);
    }
    stretch(0, at, part.plane, at + whole);
  }
}

}  // namespace
}  // namespace brn::cpu
