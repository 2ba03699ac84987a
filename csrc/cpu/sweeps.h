// The sweeps, written once for every instruction set, layout and element type, and the table of
// them and of what is done once a channel.
//
// Nothing with a scalar signature outside the unnamed namespaces is called from here, unless it is
// always inlined: the linker could take this copy of an inline function, with this file's
// instructions, for every processor.
#pragma once

#include "chains.h"
#include "channel_moments.h"
#include "channel_sums.h"
#include "channels_first.h"
#include "channels_last.h"
#include "isa.h"
#include "lanes.h"
#include "narrow.h"
#include "per_channel.h"
#include "plane_by_plane.h"
#include "rows.h"
#include "runs.h"
#include "streams.h"

#include <cstdint>
#include <type_traits>

namespace brn::cpu {
namespace {

template <typename T>
struct Entries {
  using Real = RealOf<T>;

  static bool is_narrow(const Part& part) { return part.width < kLanes<T>; }

  // Calls f(w, fetched) for the channels of a part of kChannelsFirst, where `fetched` is constant.
  template <typename F>
  static void for_each_channel(const Part& part, Fetched fetched, F f) {
    const auto all = [&](auto constant) BRN_INLINED {
      for (std::int64_t w = 0; w < part.width; ++w) f(w, constant);
    };
    switch (fetched) {
      case Fetched::kNothing: return all(FetchedConstant<Fetched::kNothing>{});
      case Fetched::kNextPlane: return all(FetchedConstant<Fetched::kNextPlane>{});
      case Fetched::kAhead: return all(FetchedConstant<Fetched::kAhead>{});
    }
  }

  static void pivots(const Part& part, const T* x, Real* pivot) {
    const T* first = x + part.first;
    const std::int64_t end = pivot_rows(part) * part.stride;
    const Real share = Real(1) / static_cast<Real>(pivot_rows(part));
    if (is_narrow(part)) {
      for (std::int64_t w = 0; w < part.width; ++w) {
        const Real x0 = to_real(first[w]);
        Real sum = 0;
        for (std::int64_t row = part.stride; row < end; row += part.stride) {
          sum += to_real(first[w + row]) - x0;
        }
        pivot[w] = x0 + sum * share;
      }
    } else {
      const auto take = [&](std::int64_t c) BRN_INLINED {
        const Lanes<T> x0 = load(first + c);
        Lanes<T> sum{};
        for (std::int64_t row = part.stride; row < end; row += part.stride) {
          sum += load(first + c + row) - x0;
        }
        store_reals<T>(pivot + c, x0 + sum * share);
      };
      const std::int64_t last = part.width - kLanes<T>;
      for (std::int64_t c = 0; c < last; c += kLanes<T>) take(c);
      take(last);
    }
  }

  static void arrange(const Part& part, Real* parameters) {
    if (part.layout == Layout::kChannelsFirst || is_narrow(part)) {
      for (std::int64_t w = 0; w < part.width; ++w)
        parameters[w] = quiet(Lanes<T>::of(parameters[w])).v[0][0];
    } else {
      arrange_columns<T>(part.width, parameters);
    }
  }

  // The other sweeps. Of lone planes, one thread, without fetching against with it, with AVX-512:
  // bfloat16, (32, 64, 56, 56) inference 1.32 and (1, 64, 56, 56) backward 1.19 times as fast;
  // float32, (1, 256, 56, 56) forward and backward 0.96 and 0.95. Zen 3 with AVX2: float32, (4, 64,
  // 56, 56) inference 1.13, (1, 64, 56, 56) forward and backward 1.05 and 1.07.
  static bool fetching_helps(const Part& part) {
    return has_planes_apart(part) || (BRN_VECTOR_BYTES == 64 && sizeof(T) != 2);
  }

  // Of what has been read before, if not in_order.
  static Fetched fetched_to_write(const Part& part) {
    if (part.in_order) return fetched_of<T>(part, fetching_helps(part));
    return fetching_helps(part) && is_fetched_along<T>(part) ? Fetched::kNextPlane
                                                             : Fetched::kNothing;
  }

  static void moments(const Part& part, const T* x, Real* pivot, Real* mean, Real* m2) {
    if (part.layout == Layout::kChannelsFirst) {
      // Of lone planes: float32, (1, 64, 56, 56), forward, one thread, 66 us, and 73 with fetching.
      // Elements of 16 bits take longer to add than to bring: (1, 128, 64, 64), 115 us, and 98 with
      // it.
      const bool helps = sizeof(T) == 2 || has_planes_apart(part);
      if (is_brief<T>(part)) return brief_channel_moments(part, x, pivot, mean, m2);
      if (goes_plane_by_plane<T>(part)) {
        return moments_plane_by_plane(part, x, pivot, mean, m2);
      }
      const Fetched fetched = fetched_of<T>(part, helps);
      for_each_channel(part, fetched, [&](std::int64_t w, auto constant) BRN_INLINED {
        const RealOf<T> mean_pivot = take_mean_pivot(part, w, x, pivot);
        const auto moments = channel_moments<constant>(part, w, x, mean_pivot);
        mean[w] = moments.mean;
        m2[w] = moments.m2;
      });
    } else {
      is_narrow(part) ? narrow_moments(rows_of(part), x, pivot, mean, m2)
                      : wide_moments(rows_of(part), x, pivot, mean, m2);
    }
  }

  static void sums(const Part& part, const T* dy, const T* x, const Real* centres,
                   const SumRows<Real>& out) {
    if (part.layout == Layout::kChannelsFirst) {
      if (is_brief<T>(part)) return brief_channel_sums(part, dy, x, centres, out);
      if (goes_plane_by_plane<T>(part)) return sums_plane_by_plane(part, dy, x, centres, out);
      const Fetched fetched = fetched_of<T>(part, fetching_helps(part));
      for_each_channel(part, fetched, [&](std::int64_t w, auto constant) BRN_INLINED {
        channel_sums<constant>(part, w, dy, x, centres, out);
      });
    } else {
      is_narrow(part) ? narrow_sums(rows_of(part), dy, x, centres, out)
                      : wide_sums(rows_of(part), dy, x, centres, out);
    }
  }

  static void normalise(const Part& part, const T* x, const Affines<Real>& a, T* y) {
    if (part.layout == Layout::kChannelsFirst && part.streamed) {
      stream_part(Normalised<T>{x, a}, part, y, part.in_order ? part.ahead : 0);
    } else if (part.layout == Layout::kChannelsFirst && goes_plane_by_plane<T>(part)) {
      normalise_plane_by_plane(part, x, a, y);
    } else if (part.layout == Layout::kChannelsFirst) {
      for_each_channel(part, fetched_to_write(part),
                       [&](std::int64_t w, auto constant)
                           BRN_INLINED { channel_normalise<constant>(part, w, x, a, y); });
    } else {
      is_narrow(part) ? narrow_normalise(rows_of(part), x, a, y)
                      : wide_normalise(rows_of(part), x, a, y);
    }
    if (part.streamed) finish_streams();
  }

  static void project(const Part& part, const T* dy, const T* x, const Real* centres,
                      const Projections<Real>& p, T* dx) {
    if (part.layout == Layout::kChannelsFirst && part.streamed) {
      stream_part(Projected<T>{dy, x, centres, p}, part, dx, part.in_order ? part.ahead : 0);
    } else if (part.layout == Layout::kChannelsFirst && goes_plane_by_plane<T>(part)) {
      project_plane_by_plane(part, dy, x, centres, p, dx);
    } else if (part.layout == Layout::kChannelsFirst) {
      for_each_channel(part, fetched_to_write(part),
                       [&](std::int64_t w, auto constant) BRN_INLINED {
                         channel_project<constant>(part, w, dy, x, centres, p, dx);
                       });
    } else {
      is_narrow(part) ? narrow_project(rows_of(part), dy, x, centres, p, dx)
                      : wide_project(rows_of(part), dy, x, centres, p, dx);
    }
    if (part.streamed) finish_streams();
  }

  static constexpr Sweeps<T> sweeps() {
    return {pivots, arrange, moments, sums, normalise, project};
  }
};

constexpr Isa table(const char* name) {
  return {name,
          kShortPlaneBytes,
          Entries<float>::sweeps(),
          Entries<double>::sweeps(),
          Entries<Half>::sweeps(),
          Entries<BFloat16>::sweeps(),
          ChannelEntries<float>::per_channel(),
          ChannelEntries<double>::per_channel()};
}

}  // namespace
}  // namespace brn::cpu
