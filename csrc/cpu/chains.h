// Sums over the vectors of a channel of kChannelsFirst.
#pragma once

#include "accumulate.h"
#include "isa.h"
#include "lanes.h"

#include <cstdint>

namespace brn::cpu {
namespace {

// Pairs of sums over runs, vector by vector in four chains, or in two where those of 16-bit
// elements would take all sixteen registers (2% of a forward, Zen 3 with AVX2). After a block of
// vectors they are taken, so that few additions stand between an element and the total. What runs
// leave over goes into one of the chains, which is full earlier if there is nothing else.
template <typename T>
struct Chains {
  static constexpr int kBlock = 64;
  static constexpr int kMostInARow = kBlock / 4;  // additions to one sum
  static constexpr int kCount = Lanes<T>::kVectors > 1 && BRN_VECTOR_BYTES < 64 ? 2 : 4;

  int block = kBlock;
  int vectors = 0;
  int tails = 0;  // of these
  LaneSums<T> sums[kCount] = {};

  BRN_LANES LaneSums<T> take() {
    const LaneSums<T> taken = sum_of<kCount>(sums);
    for (LaneSums<T>& sum : sums) sum = {};
    vectors = tails = 0;
    block = kBlock;
    return taken;
  }

  // each(i): what the vector at i adds; last(i): what is left of the run from i on. close() takes
  // the sums.
  template <typename Each, typename Last, typename Fetch, typename Close>
  BRN_LANES void add_run(std::int64_t length, Each each, Last last, Fetch fetch, Close close) {
    constexpr int kStep = kLanes<T>;
    std::int64_t i = 0;
    while (i + kCount * kStep <= length) {
      const std::int64_t room = i + (block - vectors) * kStep;
      const std::int64_t end = room < length ? room : length;
      const std::int64_t begin = i;
      LaneSums<T> open[kCount];
      for (int k = 0; k < kCount; ++k) open[k] = sums[k];
      for (; i + kCount * kStep <= end; i += kCount * kStep) {
        for (int k = 0; k < kCount; ++k) fetch(i + k * kStep);
        for (int k = 0; k < kCount; ++k) open[k] += each(i + k * kStep);
      }
      for (int k = 0; k < kCount; ++k) sums[k] = open[k];
      vectors += static_cast<int>((i - begin) / kStep);
      if (vectors > block - kCount) close();
    }
    for (; i + kStep <= length; i += kStep, ++vectors) sums[0] += each(i);
    if (i < length) {
      sums[1] += last(i);
      ++vectors;
      ++tails;
    }
    if (vectors > block - kCount || tails == kMostInARow) close();
  }
};

// Whether a part is made of whole planes of at least a vector.
template <typename T>
BRN_LANES bool has_whole_planes(const Part& part) {
  return part.plane >= kLanes<T> && part.begin == 0 && part.end % part.plane == 0;
}

template <typename T>
BRN_LANES std::int64_t vectors_of_plane(const Part& part) {
  return (part.plane + kLanes<T> - 1) / kLanes<T>;
}

// A channel of few vectors has no time for chains and blocks: what comes after them would take
// longer than they. (1, 2048, 7, 7) float32: sums 65 us with them and 44 without. A plane of many
// vectors has time for them, and is then read once for its moments, not twice. Forward and backward
// of (1, 512, 28, 28) float32, 49 vectors with AVX-512, Emerald Rapids: 232 and 269 us as brief
// channels, 212 and 261 in chains. With AVX2 a limit of a plane's own would gain as much as it
// loses: (1, 512, 20, 20), 50 vectors, 132 and 145, 118 and 158.
template <typename T>
BRN_LANES bool is_brief(const Part& part) {
  constexpr std::int64_t kMost = 64;
  constexpr std::int64_t kMostInAPlane = BRN_VECTOR_BYTES == 64 ? 32 : kMost;
  const std::int64_t vectors = vectors_of_plane<T>(part);
  return has_whole_planes<T>(part) && vectors <= kMostInAPlane &&
         part.end * vectors <= kMost * part.plane;
}

// Sums of f(element, mask) over the vectors of `planes` planes from the element `plane` on,
// mask(lanes) being those of them that are meant. fetch(element) is called before each plane with
// where it ends, and the next channel's begins.
template <typename T, typename F, typename Fetch>
BRN_LANES LaneSums<T> plane_sums(const Part& part, std::int64_t plane, std::int64_t planes, F f,
                                 Fetch fetch) {
  constexpr int kStep = kLanes<T>;
  const auto all = [](Lanes<T> lanes) BRN_INLINED { return lanes; };
  const Mask<T> last = last_elements<T>(part.plane % kStep);
  LaneSums<T> sums[2] = {};
  for (; planes > 0; --planes, plane += part.stride) {
    std::int64_t i = plane;
    const std::int64_t end = plane + part.plane;
    fetch(end);
    for (; i + 2 * kStep <= end; i += 2 * kStep) {
      sums[0] += f(i, all);
      sums[1] += f(i + kStep, all);
    }
    if (i + kStep <= end) {
      sums[0] += f(i, all);
      i += kStep;
    }
    if (i < end) sums[1] += f(end - kStep, last);
  }
  return sums[0] + sums[1];
}

}  // namespace
}  // namespace brn::cpu
