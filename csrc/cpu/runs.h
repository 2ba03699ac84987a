// Where a channel of kChannelsFirst lies, and what of it is fetched ahead. What a part has of one
// plane is a run.
#pragma once

#include "isa.h"
#include "lanes.h"

#include <cstdint>
#include <type_traits>

namespace brn::cpu {
namespace {

// The element with which the slab's w-th channel begins in the part.
BRN_LANES std::int64_t begin_of(const Part& part, std::int64_t w) {
  return part.first + w * part.plane + part.offset;
}

// Calls f(element, length, next) for the runs of the slab's w-th channel. `next` elements further
// on lies what is read after it: the channel's next plane, or the next channel.
template <typename F>
BRN_LANES void for_each_run(const Part& part, std::int64_t w, F f) {
  std::int64_t s = part.within;
  std::int64_t plane = begin_of(part, w) - s;
  for (std::int64_t left = part.end - part.begin; left > 0; plane += part.stride, s = 0) {
    const std::int64_t length = part.plane - s < left ? part.plane - s : left;
    left -= length;
    f(plane + s, length, left > 0 ? part.stride : begin_of(part, w + 1) - (plane + s));
  }
}

// For each lane, the first element that the slab's w-th channel brings there: a first run that is
// shorter than a vector leaves lanes to the run after it. 0 where no element comes.
template <typename T>
BRN_LANES Lanes<T> first_vector(const Part& part, std::int64_t w, const T* x) {
  constexpr std::int64_t kStep = kLanes<T>;
  const std::int64_t plane_left = part.plane - part.within;
  const std::int64_t left = part.end - part.begin;
  const std::int64_t length = plane_left < left ? plane_left : left;
  const T* first = x + begin_of(part, w);
  if (length >= kStep) return load(first);
  T buffer[kStep] = {};
  const std::int64_t more = left - length < part.plane ? left - length : part.plane;
  const T* second = first - part.within + part.stride;
  for (std::int64_t k = 0; k < kStep; ++k) {
    if (k < length) {
      buffer[k] = first[k];
    } else if (k < more) {
      buffer[k] = second[k];
    }
  }
  return load(buffer);
}

// What comes next lies apart from what is at hand, and prefetchers do not see it coming. Of planes
// of up to 16 kilobytes, the same place of the next one is fetched, vector by vector; of short
// ones, all of the next channel's plane, which is a neighbour; longer ones need no help. GB/s of x
// or of dy and x out of memory, one thread, float32, without and with it: (32, 64, 56, 56), moments
// 14 and 18, sums 21 and 27; (32, 128, 28, 28), 13 and 17, 16 and 25. So many lines at once can be
// too many. Zen 3 with AVX2, plane at once and vector by vector, us: (32, 128, 28, 28) bfloat16,
// forward 2,011 and 1,558, backward 3,806 and 2,568; channel by channel (see plane_by_plane.h),
// (32, 256, 14, 14) float32, backward 3,321 and 2,644, but (32, 512, 7, 7), forward 684 and 1,011.
// With AVX-512, Emerald Rapids, of 1,568 and 784 bytes: (32, 128, 28, 28) bfloat16, forward 805 and
// 789, backward 1,404 and 1,271; (4, 1024, 14, 14) float32, 442 and 505, 663 and 654.
template <typename T>
constexpr std::int64_t kShortPlane = (BRN_VECTOR_BYTES == 64 ? 1280 : 384) / sizeof(T);
template <typename T>
constexpr std::int64_t kLongPlane = 16384 / sizeof(T);

template <typename T>
BRN_LANES bool is_fetched_along(const Part& part) {
  return part.plane > kShortPlane<T> && part.plane <= kLongPlane<T>;
}
// Whether the next plane lies apart. A lone plane's neighbour does not, and prefetchers follow.
BRN_LANES bool has_planes_apart(const Part& part) { return part.end - part.begin > part.plane; }

// What is fetched, vector by vector.
enum class Fetched {
  kNothing,
  kNextPlane,  // its same place
  kAhead,      // what lies Part::ahead further on
};
template <Fetched kValue>
using FetchedConstant = std::integral_constant<Fetched, kValue>;

// Of what a part reads out of memory. `helps`: whether it does to fetch the next plane.
template <typename T>
BRN_LANES Fetched fetched_of(const Part& part, bool helps) {
  if (part.ahead != 0 && (!has_planes_apart(part) || part.plane > kLongPlane<T>)) {
    return Fetched::kAhead;
  }
  return helps && is_fetched_along<T>(part) ? Fetched::kNextPlane : Fetched::kNothing;
}
template <bool kToWrite = false, typename T>
BRN_LANES void fetch_lines(const Part& part, const T* plane) {
  constexpr std::int64_t kLine = 64 / sizeof(T);
  if (part.to_l1) {
    for (std::int64_t i = 0; i < part.plane; i += kLine) fetch<kToWrite, true>(plane + i);
  } else {
    for (std::int64_t i = 0; i < part.plane; i += kLine) fetch<kToWrite>(plane + i);
  }
}
// A short plane, all of it.
template <bool kToWrite = false, typename T>
BRN_LANES void fetch_plane(const Part& part, const T* plane) {
  if (part.plane <= kShortPlane<T>) fetch_lines<kToWrite>(part, plane);
}

// While a slab is written its planes come from the cache and memory has time for the slab after it:
// elements to the same place there, or 0. That pays where prefetchers would have to find many
// planes. Forward and backward, one thread, float32: (32, 64, 56, 56) 1.05 and 1.08 times as fast,
// (1, 256, 56, 56) 0.92 and 0.96. On Zen 3 with AVX2 four planes are enough if they are long, or of
// 16-bit elements, whose arithmetic takes longer: (4, 64, 56, 56) float32 1.07 and 1.04, bfloat16
// 1.05 and 1.12; but (4, 1024, 14, 14) float32 0.92 and 0.94.
template <typename T>
BRN_LANES std::int64_t fetched_ahead_of_writing(const Part& part) {
  constexpr std::int64_t kSome = sizeof(T) == 2 ? kShortPlane<T> : 4096 / sizeof(T);
  const bool some = BRN_VECTOR_BYTES < 64 && part.plane > kSome;
  const std::int64_t planes = some ? kManyPlanes / 2 : part.many_planes;
  const bool many = part.end - part.begin >= planes * part.plane;
  return part.plane <= kLongPlane<T> && many ? part.next : 0;
}

}  // namespace
}  // namespace brn::cpu
