// The sweeps of kChannelsFirst plane by plane, for planes that are many and short: of each plane
// all channels of the slab, one after the other, as they lie in memory. What the channels have come
// to stays in the L1. Channel by channel, memory would be read in pieces of a plane, and a slab
// whose planes lie a power of two apart would find no room in the caches.
//
// Against that order, both with the slab that suits it best, float32 and bfloat16, one thread, Zen
// 3 with AVX2: (32, 2048, 7, 7) forward 1.31 and 1.40, backward 1.38 and 1.53 times as fast; (32,
// 1024, 14, 14) 1.12 and 1.23, 1.14 and 1.42; (32, 256, 14, 14) 1.04 and 1.13, 1.11 and 1.21.
// Longer planes, or fewer: (32, 128, 28, 28) float32 0.74 and 0.67, (4, 1024, 14, 14) 0.71 and
// 0.83. With AVX-512, Emerald Rapids: (32, 2048, 7, 7) 1.05 and 1.11, 1.06 and 1.04; of more than
// 512 bytes, (32, 1024, 14, 14) float32, 0.91 and 0.97.
#pragma once

#include "accumulate.h"
#include "chains.h"
#include "channel_moments.h"
#include "channel_sums.h"
#include "channels_first.h"
#include "isa.h"
#include "lanes.h"
#include "runs.h"

#include <cstdint>

namespace brn::cpu {
namespace {

constexpr std::int64_t kShortPlaneBytes = BRN_VECTOR_BYTES == 64 ? 512 : 1024;

// slab_width() has the same limits. It does not know of planes that are cut, or shorter than a
// vector: those go channel by channel.
template <typename T>
BRN_LANES bool goes_plane_by_plane(const Part& part) {
  const auto bytes = part.plane * static_cast<std::int64_t>(sizeof(T));
  return has_whole_planes<T>(part) && bytes <= kShortPlaneBytes &&
         part.end / part.plane >= kManyPlanes;
}

// Channels that go together: what is kept of them takes half of an L1 at most.
template <typename T>
constexpr std::int64_t kGroup = sizeof(Lanes<T>) < 128 ? 32 : 16;

template <typename T, typename F>
BRN_LANES void for_each_group(const Part& part, F f) {
  for (std::int64_t w = 0; w < part.width; w += kGroup<T>) {
    f(w, part.width - w < kGroup<T> ? part.width - w : kGroup<T>);
  }
}

// Sums over the planes of the `count` channels from `first` on. each(element, k, next): what the
// plane that begins at the element adds to the k-th of them; `next` elements further on begins its
// next one, or it is 0. close(planes, k, sums) takes the sums of a block of planes: one at least,
// else as many as have no more vectors than a block of chains, or in the first one kFirst; but of
// one vector each, which are added one after the other, no more than go in a row.
template <int kFirst, typename T, typename Each, typename Close>
BRN_LANES void reduce_plane_by_plane(const Part& part, std::int64_t first, std::int64_t count,
                                     Each each, Close close) {
  static_assert(kShortPlaneBytes <= Chains<T>::kBlock * BRN_VECTOR_BYTES, "a plane is no more");
  constexpr std::int64_t kMostPlanes = Chains<T>::kMostInARow;
  const std::int64_t vectors = vectors_of_plane<T>(part);
  LaneSums<T> open[kGroup<T>];
  std::int64_t plane = begin_of(part, first);
  std::int64_t in_block = kFirst;
  for (std::int64_t left = part.end / part.plane; left > 0; in_block = Chains<T>::kBlock) {
    const std::int64_t fit = vectors < in_block ? in_block / vectors : 1;
    const std::int64_t most = fit < kMostPlanes ? fit : kMostPlanes;
    const std::int64_t block = left < most ? left : most;
    for (std::int64_t n = 0; n < block; ++n, plane += part.stride) {
      const std::int64_t next = --left > 0 ? part.stride : 0;
      for (std::int64_t k = 0; k < count; ++k) {
        LaneSums<T> sums = each(plane + k * part.plane, k, next);
        if (n > 0) sums += open[k];
        if (n + 1 < block) {
          open[k] = sums;
        } else {
          close(block, k, sums);
        }
      }
    }
  }
}

// A plane may be longer than a first block should be (see BlockMoments). Then its own mean becomes
// the centre beforehand: of each channel the first one is read twice.
template <typename T>
void moments_plane_by_plane(const Part& part, const T* x, RealOf<T>* pivot, RealOf<T>* mean,
                            RealOf<T>* m2) {
  using Real = RealOf<T>;
  constexpr int kFirst = BlockMoments<T>::kFirstBlock;
  constexpr int kStep = kLanes<T>;
  const Lanes<T> of_plane = Lanes<T>::of(static_cast<Real>(part.plane / kStep)) +
                            last_elements<T>(part.plane % kStep)(Lanes<T>::of(1));
  for_each_group<T>(part, [&](std::int64_t first, std::int64_t count) BRN_INLINED {
    BlockMoments<T> moments[kGroup<T>];
    static_assert(sizeof(moments) + kGroup<T> * sizeof(LaneSums<T>) <= 16 * 1024);
    const auto deviations = [&](std::int64_t plane, std::int64_t k, std::int64_t next) BRN_INLINED {
      const Lanes<T> centre = moments[k].centre;
      return plane_deviations(
          part, plane, 1, x,
          [&](std::int64_t) BRN_INLINED {
            if (next != 0) fetch_lines(part, x + plane + next);
          },
          [&](Lanes<T> v) BRN_INLINED { return v - centre; });
    };
    for (std::int64_t k = 0; k < count; ++k) {
      const Lanes<T> pivots = Lanes<T>::of(take_mean_pivot(part, first + k, x, pivot));
      moments[k] = BlockMoments<T>(pivots, first_vector(part, first + k, x));
      if (vectors_of_plane<T>(part) > kFirst) {
        moments[k].recentre(of_plane, deviations(begin_of(part, first + k), k, 0));
      }
    }
    reduce_plane_by_plane<kFirst, T>(
        part, first, count, deviations,
        [&](std::int64_t planes, std::int64_t k, LaneSums<T> sums)
            BRN_INLINED { moments[k].add_block(of_plane * static_cast<Real>(planes), sums); });
    for (std::int64_t k = 0; k < count; ++k) {
      const auto channel = moments[k].across(static_cast<Real>(part.end));
      mean[first + k] = channel.mean;
      m2[first + k] = channel.m2;
    }
  });
}

template <typename T>
void sums_plane_by_plane(const Part& part, const T* dy, const T* x, const RealOf<T>* centres,
                         const SumRows<RealOf<T>>& rows) {
  for_each_group<T>(part, [&](std::int64_t first, std::int64_t count) BRN_INLINED {
    ExactSum<Lanes<T>> g[kGroup<T>];
    ExactSum<Lanes<T>> gx[kGroup<T>];
    for (std::int64_t k = 0; k < count; ++k) g[k] = gx[k] = {};
    reduce_plane_by_plane<Chains<T>::kBlock, T>(
        part, first, count,
        [&](std::int64_t plane, std::int64_t k, std::int64_t next) BRN_INLINED {
          const auto fetch_next = [&](std::int64_t) BRN_INLINED {
            if (next == 0) return;
            fetch_lines(part, dy + plane + next);
            fetch_lines(part, x + plane + next);
          };
          return plane_products(part, plane, 1, dy, x, Lanes<T>::of(centres[first + k]),
                                fetch_next);
        },
        [&](std::int64_t, std::int64_t k, LaneSums<T> sums) BRN_INLINED {
          g[k].add(sums.values);
          gx[k].add(sums.products);
        });
    for (std::int64_t k = 0; k < count; ++k) {
      keep_sums(rows, first + k, sum_in_double(g[k]), sum_in_double(gx[k]));
    }
  });
}

// Calls f(w, element) for the planes of a part.
template <typename F>
BRN_LANES void for_each_plane(const Part& part, F f) {
  const std::int64_t planes = part.end / part.plane;
  for (std::int64_t n = 0; n < planes; ++n) {
    for (std::int64_t w = 0; w < part.width; ++w) f(w, begin_of(part, w) + n * part.stride);
  }
}

template <typename T>
void normalise_plane_by_plane(const Part& part, const T* x, const Affines<RealOf<T>>& a, T* y) {
  for_each_plane(part, [&](std::int64_t w, std::int64_t at) BRN_INLINED {
    normalise_run<Fetched::kNothing>(part, affine_of<T>(a, w), x, y, at, part.plane, 0, 0);
  });
}

template <typename T>
void project_plane_by_plane(const Part& part, const T* dy, const T* x, const RealOf<T>* centres,
                            const Projections<RealOf<T>>& p, T* dx) {
  for_each_plane(part, [&](std::int64_t w, std::int64_t at) BRN_INLINED {
    project_run<Fetched::kNothing>(part, Lanes<T>::of(centres[w]), projection_of<T>(p, w), dy, x,
                                   dx, at, part.plane, 0, 0);
  });
}

}  // namespace
}  // namespace brn::cpu
