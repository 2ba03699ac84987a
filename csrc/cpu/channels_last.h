// The sweeps of kChannelsLast, for rows of at least a vector. Each lane is a channel; a tile is
// kRows rows of one vector, which stay in registers between its mean and its m2.
#pragma once

#include "../core/math.h"
#include "accumulate.h"
#include "isa.h"
#include "lanes.h"

#include <cstdint>

namespace brn::cpu {
namespace {

struct Rows {
  std::int64_t first;
  std::int64_t count;
  std::int64_t stride;
  std::int64_t width;
};

BRN_LANES Rows rows_of(const Part& part) {
  return {part.first + part.begin * part.stride, part.end - part.begin, part.stride, part.width};
}

constexpr int kRows = 8;  // of a tile, at most

// Calls f(column, end) for stretches of whole vectors. Where the width is no multiple of a vector,
// the last one is a stretch of its own over columns that were done before, with the same result.
template <typename T, typename F>
BRN_LANES void for_each_stretch(const Rows& rows, F f) {
  const std::int64_t whole = rows.width / kLanes<T> * kLanes<T>;
  f(std::int64_t{0}, whole);
  if (whole < rows.width) f(rows.width - kLanes<T>, rows.width);
}

// Reads the lines of `size` elements in their order, before what follows reads them in another one,
// or together with writes: prefetchers follow nothing as well as this.
template <typename T>
BRN_LANES void touch(const T* from, std::int64_t size) {
  constexpr std::int64_t kLine = 64 / sizeof(T);
  for (const T* end = from + size; from < end; from += kLine) {
    static_cast<void>(*reinterpret_cast<const volatile unsigned char*>(from));
  }
}

// The lines of a tile, a page of each tensor at a time. GB/s of x out of memory without and with
// it: C = 64, moments 20 and 33, sums 6.8 and 17.9.
template <typename T, typename... Others>
BRN_LANES void touch_tile(const Rows& rows, std::int64_t height, const T* tile,
                          const Others*... others) {
  constexpr std::int64_t kPage = 4096 / sizeof(T);
  if (rows.width != rows.stride || rows.stride > kPage / 2) return;
  const std::int64_t size = height * rows.stride;
  for (std::int64_t at = 0; at < size; at += kPage) {
    const std::int64_t count = at + kPage < size ? kPage : size - at;
    touch(tile + at, count);
    (touch(others + at, count), ...);
  }
}

template <typename T>
using LaneMoments = SharedMoments<RealOf<T>, Lanes<T>>;

template <int kTall, typename T>
BRN_LANES LaneMoments<T> tile_moments(const T* x, std::int64_t stride, Lanes<T> pivot) {
  Lanes<T> u[kTall];
  for (int k = 0; k < kTall; ++k) u[k] = load(x + k * stride) - pivot;
  const Lanes<T> mean = sum_of<kTall>(u) * (RealOf<T>(1) / kTall);
  for (int k = 0; k < kTall; ++k) u[k] = (u[k] - mean) * (u[k] - mean);
  return {kTall, mean, sum_of<kTall>(u)};
}

// Of fewer rows.
template <typename T>
BRN_LANES LaneMoments<T> short_moments(const T* x, std::int64_t stride, Lanes<T> pivot,
                                       std::int64_t rows) {
  Lanes<T> mean{};
  Lanes<T> m2{};
  for (std::int64_t k = 0; k < rows; ++k) mean += load(x + k * stride) - pivot;
  mean = mean * (RealOf<T>(1) / static_cast<RealOf<T>>(rows));
  for (std::int64_t k = 0; k < rows; ++k) {
    const Lanes<T> deviation = (load(x + k * stride) - pivot) - mean;
    m2 += deviation * deviation;
  }
  return {static_cast<RealOf<T>>(rows), mean, m2};
}

// ---- one row after the other

// For sums, which read two tensors, where a tile has more than a page of each. What is accumulated
// is in the L1, in slots of a vector each (the last vector of a row may cover columns of the one
// before it). GB/s of x out of memory by tiles and by rows: C = 256, 7.3 and 12.0; C = 512, 6.2 and
// 9.6; C = 1,024, 10.2 and 7.9.
template <typename T>
BRN_LANES bool is_one_by_one(const Rows& rows) {
  constexpr std::int64_t kPage = 4096 / sizeof(T);
  return kRows * rows.width > kPage && rows.width < kPage;
}
template <typename T>
constexpr int kSlots = 4096 / BRN_VECTOR_BYTES;

// Calls f(slot, column).
template <typename T, typename F>
BRN_LANES void for_each_slot(const Rows& rows, F f) {
  const int whole = static_cast<int>(rows.width / kLanes<T>);
  for (int slot = 0; slot < whole; ++slot) f(slot, slot * kLanes<T>);
  if (whole * kLanes<T> < rows.width) f(whole, rows.width - kLanes<T>);
}

template <typename T>
void row_sums(const Rows& rows, const T* dy, const T* x, const RealOf<T>* centres,
              const SumRows<RealOf<T>>& out) {
  constexpr std::int64_t kTogether = 8;
  Lanes<T> centre[kSlots<T>];
  LaneSums<T> sums[kSlots<T>];
  struct {
    ExactSum<Lanes<T>> g, gx;
  } totals[kSlots<T>];
  for_each_slot<T>(rows, [&](int slot, std::int64_t c) BRN_INLINED {
    centre[slot] = load_reals<T>(centres + c);
    totals[slot] = {};
  });
  for (std::int64_t begin = 0; begin < rows.count; begin += kTogether) {
    const std::int64_t end = begin + kTogether < rows.count ? begin + kTogether : rows.count;
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t at = rows.first + row * rows.stride;
      for_each_slot<T>(rows, [&](int slot, std::int64_t c) BRN_INLINED {
        const Lanes<T> g = load(dy + at + c);
        const LaneSums<T> more{g, g * (load(x + at + c) - centre[slot])};
        sums[slot] = row == begin ? more : LaneSums<T>(sums[slot]) += more;
      });
    }
    for_each_slot<T>(rows, [&](int slot, std::int64_t) BRN_INLINED {
      totals[slot].g.add(sums[slot].g);
      totals[slot].gx.add(sums[slot].gx);
    });
  }
  for_each_slot<T>(rows, [&](int slot, std::int64_t c) BRN_INLINED {
    store_reals<T>(out.g + c, totals[slot].g.sum);
    store_reals<T>(out.g_error + c, totals[slot].g.error);
    store_reals<T>(out.gx + c, totals[slot].gx.sum);
    store_reals<T>(out.gx_error + c, totals[slot].gx.error);
  });
}

template <int kTall, typename T>
void tall_moments(const Rows& rows, const T* x, const RealOf<T>* pivot, RealOf<T>* mean,
                  RealOf<T>* m2) {
  for_each_stretch<T>(rows, [&](std::int64_t column, std::int64_t end) BRN_INLINED {
    for (std::int64_t row = 0; row < rows.count; row += kTall) {
      const T* tile = x + rows.first + row * rows.stride;
      const std::int64_t height = rows.count - row < kTall ? rows.count - row : kTall;
      touch_tile(rows, height, tile);
      for (std::int64_t c = column; c < end; c += kLanes<T>) {
        const Lanes<T> pivots = load_reals<T>(pivot + c);
        LaneMoments<T> moments = height == kTall
                                     ? tile_moments<kTall>(tile + c, rows.stride, pivots)
                                     : short_moments(tile + c, rows.stride, pivots, height);
        if (row > 0) {
          const auto before = static_cast<RealOf<T>>(row);
          moments = merge({before, load_reals<T>(mean + c), load_reals<T>(m2 + c)}, moments);
        }
        store_reals<T>(mean + c, moments.mean);
        store_reals<T>(m2 + c, moments.m2);
      }
    }
  });
}

// A tile of a page is touched while the one before it is still in work; of two pages no longer.
// GB/s of x out of memory by 8 rows and by a page: C = 256, 17 and 20; C = 512, 14 and 22. Rows of
// a page are read in an order that is followed anyway.
template <typename T>
void wide_moments(const Rows& rows, const T* x, const RealOf<T>* pivot, RealOf<T>* mean,
                  RealOf<T>* m2) {
  constexpr std::int64_t kPage = 4096 / sizeof(T);
  if (2 * rows.width <= kPage && 4 * rows.width > kPage) {
    return tall_moments<2>(rows, x, pivot, mean, m2);
  }
  if (4 * rows.width <= kPage && 8 * rows.width > kPage) {
    return tall_moments<4>(rows, x, pivot, mean, m2);
  }
  return tall_moments<kRows>(rows, x, pivot, mean, m2);
}

template <typename T>
void wide_sums(const Rows& rows, const T* dy, const T* x, const RealOf<T>* centres,
               const SumRows<RealOf<T>>& out) {
  if (is_one_by_one<T>(rows)) return row_sums(rows, dy, x, centres, out);
  for_each_stretch<T>(rows, [&](std::int64_t column, std::int64_t end) BRN_INLINED {
    for (std::int64_t row = 0; row < rows.count; row += kRows) {
      const std::int64_t tile = rows.first + row * rows.stride;
      const std::int64_t height = rows.count - row < kRows ? rows.count - row : kRows;
      touch_tile(rows, height, dy + tile, x + tile);
      for (std::int64_t c = column; c < end; c += kLanes<T>) {
        const Lanes<T> centre = load_reals<T>(centres + c);
        LaneSums<T> sums{};
        if (height == kRows) {
          sums = tile_sums(dy + tile + c, x + tile + c, rows.stride, centre);
        } else {
          for (std::int64_t k = tile + c; k < tile + c + height * rows.stride; k += rows.stride) {
            const Lanes<T> g = load(dy + k);
            sums += {g, g * (load(x + k) - centre)};
          }
        }
        ExactSum<Lanes<T>> g{};
        ExactSum<Lanes<T>> gx{};
        if (row > 0) {
          g = {load_reals<T>(out.g + c), load_reals<T>(out.g_error + c)};
          gx = {load_reals<T>(out.gx + c), load_reals<T>(out.gx_error + c)};
        }
        g.add(sums.g);
        gx.add(sums.gx);
        store_reals<T>(out.g + c, g.sum);
        store_reals<T>(out.g_error + c, g.error);
        store_reals<T>(out.gx + c, gx.sum);
        store_reals<T>(out.gx_error + c, gx.error);
      }
    }
  });
}

// Calls f(element, rows, column) for each vector of columns, kTogether rows at a time, so that the
// parameters of its channels stay in registers.
template <int kTogether, typename T, typename F>
BRN_LANES void for_each_vector_of(const Rows& rows, F f) {
  const std::int64_t whole = rows.width / kLanes<T> * kLanes<T>;
  const auto each = [&](std::int64_t at, std::int64_t height) BRN_INLINED {
    for (std::int64_t c = 0; c < whole; c += kLanes<T>) f(at + c, height, c);
    // Over columns that are done, with the same result.
    if (whole < rows.width) f(at + rows.width - kLanes<T>, height, rows.width - kLanes<T>);
  };
  for (std::int64_t row = 0; row < rows.count; row += kTogether) {
    const std::int64_t at = rows.first + row * rows.stride;
    if (rows.count - row >= kTogether) {
      each(at, kTogether);  // unrolled
    } else {
      each(at, rows.count - row);
    }
  }
}

// Rows shorter than a page: two kilobytes of each tensor are touched, then done row by row. GB/s of
// x for y out of memory without and with that, where a plain loop has 14: C = 64, 11.0 and 13.2; C
// = 256, 10.6 and 12.2; by 2 rows at a time, 5.8. Longer ones: row by row as they are, unless their
// parameters, kReals a channel, do not fit the L1 (C = 2,048 by 1, 2 and 4 rows: 7.7, 9.6, 10.8).
template <int kReals, typename T, typename F, typename... Others>
BRN_LANES void for_each_vector(const Rows& rows, F f, const T* x, const Others*... others) {
  constexpr std::int64_t kTouched = 2048 / sizeof(T);
  constexpr std::int64_t kLongest = 16384 / (kReals * sizeof(RealOf<T>));
  // And 16-bit ones, below: (4, 1024, 14, 14) bfloat16, backward, 512 us row by row and 441 us so.
  if (rows.width > kLongest || (sizeof(T) == 2 && rows.width >= kTouched)) {
    return for_each_vector_of<4, T>(rows, f);
  }
  if (rows.width != rows.stride || rows.width >= 2 * kTouched) {
    return for_each_vector_of<1, T>(rows, f);
  }
  const std::int64_t few = rows.width < kTouched ? kTouched / rows.width : 1;
  for (std::int64_t row = 0; row < rows.count; row += few) {
    const std::int64_t count = rows.count - row < few ? rows.count - row : few;
    const Rows touched{rows.first + row * rows.stride, count, rows.stride, rows.width};
    touch(x + touched.first, count * rows.width);
    (touch(others + touched.first, count * rows.width), ...);
    // 16-bit elements wait for their parameters, which have to be shuffled: (4, 256, 14, 14)
    // bfloat16, forward, 58 us row by row and 49 us so.
    if (sizeof(T) == 2 && few >= 4) {
      for_each_vector_of<4, T>(touched, f);
    } else if (sizeof(T) == 2 && few >= 2) {
      for_each_vector_of<2, T>(touched, f);
    } else {
      for_each_vector_of<1, T>(touched, f);
    }
  }
}

template <typename T>
void wide_normalise(const Rows& rows, const T* x, const Affines<RealOf<T>>& a, T* y) {
  const auto normalise = [&](std::int64_t at, std::int64_t height, std::int64_t c) BRN_INLINED {
    const CentredAffine<Lanes<T>> affine{load_reals<T>(a.centre + c), load_reals<T>(a.scale + c),
                                         load_reals<T>(a.shift + c)};
    for (std::int64_t k = 0; k < height; ++k, at += rows.stride) {
      store(y + at, apply(affine, load(x + at)));
    }
  };
  for_each_vector<3>(rows, normalise, x);
}

template <typename T>
void wide_project(const Rows& rows, const T* dy, const T* x, const RealOf<T>* centres,
                  const Projections<RealOf<T>>& p, T* dx) {
  const auto project = [&](std::int64_t at, std::int64_t height, std::int64_t c) BRN_INLINED {
    const Lanes<T> centre = load_reals<T>(centres + c);
    const Projection<Lanes<T>> projection{load_reals<T>(p.mean_g + c), load_reals<T>(p.slope + c),
                                          load_reals<T>(p.scale + c)};
    for (std::int64_t k = 0; k < height; ++k, at += rows.stride) {
      store(dx + at, apply(projection, load(dy + at), load(x + at) - centre));
    }
  };
  for_each_vector<4>(rows, project, dy, x);
}

}  // namespace
}  // namespace brn::cpu
