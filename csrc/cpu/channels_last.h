// The sweeps of kChannelsLast, for rows of at least a vector. Each lane is a channel; a tile is
// kRows rows of one vector.
#pragma once

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
  bool streamed;
};

BRN_LANES Rows rows_of(const Part& part) {
  return {part.first + part.begin * part.stride, part.end - part.begin, part.stride, part.width,
          part.streamed};
}

constexpr int kRows = 8;  // of a tile, at most

// Elements from what is at hand to what is fetched: a tile, or two pages, since prefetchers stop
// where a page ends. GB/s of x or of dy and x out of memory, one thread, float32, without and with
// it, by channels. Moments: 512, 13 and 25; 1,024, 17 and 25. Sums: 512, 6 and 22; 1,024, 10
// and 21. bfloat16 backward, (4, 512, 28, 28): 1,090 us and 560.
template <typename T>
BRN_LANES std::int64_t fetched_ahead(const Rows& rows) {
  constexpr std::int64_t kLeast = 8192 / sizeof(T);
  return kRows * rows.stride > kLeast ? kRows * rows.stride : kLeast;
}

template <typename T>
using LaneMoments = SharedMoments<RealOf<T>, Lanes<T>>;

// Of `rows` rows, around the first of them, whose squares are at most kRows times m2.
template <typename T>
BRN_LANES LaneMoments<T> tile_moments(const T* x, std::int64_t stride, std::int64_t ahead,
                                      Lanes<T> pivot, int rows) {
  const Lanes<T> first = load(x);
  fetch(x + ahead);
  Lanes<T> sum[2] = {};
  Lanes<T> squares[2] = {first - first, {}};  // of infinity: NaN
  for (int k = 1; k < rows; ++k) {
    fetch(x + k * stride + ahead);
    const Lanes<T> d = load(x + k * stride) - first;
    sum[k % 2] += d;
    squares[k % 2] += d * d;
  }
  const Lanes<T> d = sum[0] + sum[1];
  const Lanes<T> mean = d * (RealOf<T>(1) / rows);
  return {static_cast<RealOf<T>>(rows), (first - pivot) + mean,
          (squares[0] + squares[1]) - d * mean};
}

// Values of columns lie vector by vector, in the order of lanes, at the place of their first
// column. Where the width is no multiple of a vector, the last one covers columns of the one before
// it: its values come after those of all whole vectors, and to the same.
template <typename T>
BRN_LANES std::int64_t whole_columns(std::int64_t width) {
  return width / kLanes<T> * kLanes<T>;
}
template <typename T>
BRN_LANES void arrange_columns(std::int64_t width, RealOf<T>* values) {
  const std::int64_t whole = whole_columns<T>(width);
  if (whole < width) {
    store_lanes(values + whole, quiet(load_reals<T>(values + width - kLanes<T>)));
  }
  for (std::int64_t c = 0; c < whole; c += kLanes<T>) {
    store_lanes(values + c, quiet(load_reals<T>(values + c)));
  }
}
// Back to one value a column.
template <typename T>
BRN_LANES void spread_columns(std::int64_t width, RealOf<T>* values) {
  const std::int64_t whole = whole_columns<T>(width);
  for (std::int64_t c = 0; c < whole; c += kLanes<T>) {
    store_reals(values + c, load_lanes<T>(values + c));
  }
  if (whole < width) store_reals(values + width - kLanes<T>, load_lanes<T>(values + whole));
}

// Calls f(row, height, column, place) for each tile; place: where its columns' values lie.
template <typename T, typename F>
BRN_LANES void for_each_tile(const Rows& rows, F f) {
  const std::int64_t whole = whole_columns<T>(rows.width);
  for (std::int64_t row = 0; row < rows.count; row += kRows) {
    const std::int64_t height = rows.count - row < kRows ? rows.count - row : kRows;
    for (std::int64_t c = 0; c < whole; c += kLanes<T>) f(row, height, c, c);
    if (whole < rows.width) f(row, height, rows.width - kLanes<T>, whole);
  }
}

template <typename T>
void wide_moments(const Rows& rows, const T* x, const RealOf<T>* pivot, RealOf<T>* mean,
                  RealOf<T>* m2) {
  const std::int64_t ahead = fetched_ahead<T>(rows);
  for_each_tile<T>(rows, [&](std::int64_t row, std::int64_t height, std::int64_t c,
                             std::int64_t place) BRN_INLINED {
    const T* tile = x + rows.first + row * rows.stride + c;
    const Lanes<T> pivots = load_reals<T>(pivot + c);
    LaneMoments<T> moments =
        height == kRows ? tile_moments(tile, rows.stride, ahead, pivots, kRows)
                        : tile_moments(tile, rows.stride, 0, pivots, static_cast<int>(height));
    if (row > 0) {
      moments = merge(
          {static_cast<RealOf<T>>(row), load_lanes<T>(mean + place), load_lanes<T>(m2 + place)},
          moments);
    }
    store_lanes(mean + place, moments.mean);
    store_lanes(m2 + place, moments.m2);
  });
  if (rows.count == 0) return;
  spread_columns<T>(rows.width, mean);
  spread_columns<T>(rows.width, m2);
}

template <typename T>
void wide_sums(const Rows& rows, const T* dy, const T* x, const RealOf<T>* centres,
               const SumRows<RealOf<T>>& out) {
  const std::int64_t ahead = fetched_ahead<T>(rows);
  for_each_tile<T>(rows, [&](std::int64_t row, std::int64_t height, std::int64_t c,
                             std::int64_t place) BRN_INLINED {
    const std::int64_t tile = rows.first + row * rows.stride + c;
    const Lanes<T> centre = load_lanes<T>(centres + place);
    LaneSums<T> sums{};
    if (height == kRows) {
      for (int k = 0; k < kRows; ++k) {
        fetch(dy + tile + k * rows.stride + ahead);
        fetch(x + tile + k * rows.stride + ahead);
      }
      sums = tile_sums(dy + tile, x + tile, rows.stride, centre);
    } else {
      for (std::int64_t k = tile; k < tile + height * rows.stride; k += rows.stride) {
        const Lanes<T> g = load(dy + k);
        sums += LaneSums<T>::of(g, load(x + k) - centre);
      }
    }
    ExactSum<Lanes<T>> g{};
    ExactSum<Lanes<T>> gx{};
    if (row > 0) {
      g = {load_lanes<T>(out.g + place), load_lanes<T>(out.g_error + place)};
      gx = {load_lanes<T>(out.gx + place), load_lanes<T>(out.gx_error + place)};
    }
    g.add(sums.values);
    gx.add(sums.products);
    store_lanes(out.g + place, g.sum);
    store_lanes(out.g_error + place, g.error);
    store_lanes(out.gx + place, gx.sum);
    store_lanes(out.gx_error + place, gx.error);
  });
  if (rows.count == 0) return;
  for (RealOf<T>* row : {out.g, out.g_error, out.gx, out.gx_error}) {
    spread_columns<T>(rows.width, row);
  }
}

// What is written goes by kTogether rows of a vector each, which share their parameters. Two
// kilobytes, or those rows, ahead of it lines are fetched; those to be written only where rows are
// long enough for neighbours of a column to lie apart: in rows of 256 bytes, inference of (4, 128,
// 28, 28) bfloat16 takes 52 us, and 65 with it. GB/s of x for y, (32, 1024, 14, 14) float32, a row
// at a time, 4 and 8: 14.9, 17.6 and 15.8.
constexpr int kTogether = 4;

template <typename T>
struct Ahead {
  std::int64_t elements;
  bool written;

  BRN_LANES explicit Ahead(const Rows& rows)
      : elements(kTogether * rows.stride), written(rows.stride * sizeof(T) >= 512) {
    constexpr std::int64_t kLeast = 2048 / sizeof(T);
    if (elements < kLeast) elements = kLeast;
  }
};

// Calls f(element, rows, place) for each vector of columns, kTogether rows at a time.
template <typename T, typename F>
BRN_LANES void for_each_vector(const Rows& rows, F f) {
  const std::int64_t whole = whole_columns<T>(rows.width);
  const auto each = [&](std::int64_t at, std::int64_t height) BRN_INLINED {
    for (std::int64_t c = 0; c < whole; c += kLanes<T>) f(at + c, height, c);
    // Over columns that are done, with the same result.
    if (whole < rows.width) f(at + rows.width - kLanes<T>, height, whole);
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

template <typename T>
void wide_normalise(const Rows& rows, const T* x, const Affines<RealOf<T>>& a, T* y) {
  const Ahead<T> ahead(rows);
  const bool streamed =
      rows.streamed && rows.width % kLanes<T> == 0 && is_aligned(y + rows.first, rows.stride);
  const auto normalise = [&](std::int64_t at, std::int64_t height, std::int64_t place) BRN_INLINED {
    const CentredAffine<Lanes<T>> affine{load_lanes<T>(a.centre + place),
                                         load_lanes<T>(a.scale + place),
                                         load_lanes<T>(a.shift + place)};
    for (std::int64_t k = 0; k < height; ++k, at += rows.stride) {
      fetch(x + at + ahead.elements);
      const Lanes<T> made = apply(affine, load(x + at));
      if (streamed) {
        stream(y + at, made);
      } else {
        if (ahead.written) fetch<true>(y + at + ahead.elements);
        store(y + at, made);
      }
    }
  };
  for_each_vector<T>(rows, normalise);
}

template <typename T>
void wide_project(const Rows& rows, const T* dy, const T* x, const RealOf<T>* centres,
                  const Projections<RealOf<T>>& p, T* dx) {
  const Ahead<T> ahead(rows);
  const bool streamed =
      rows.streamed && rows.width % kLanes<T> == 0 && is_aligned(dx + rows.first, rows.stride);
  const auto project = [&](std::int64_t at, std::int64_t height, std::int64_t place) BRN_INLINED {
    const Lanes<T> centre = load_lanes<T>(centres + place);
    const Projection<Lanes<T>> projection{load_lanes<T>(p.mean_g + place),
                                          load_lanes<T>(p.slope + place),
                                          load_lanes<T>(p.scale + place)};
    for (std::int64_t k = 0; k < height; ++k, at += rows.stride) {
      fetch(dy + at + ahead.elements);
      fetch(x + at + ahead.elements);
      const Lanes<T> made = apply(projection, load(dy + at), load(x + at) - centre);
      if (streamed) {
        stream(dx + at, made);
      } else {
        if (ahead.written) fetch<true>(dx + at + ahead.elements);
        store(dx + at, made);
      }
    }
  };
  for_each_vector<T>(rows, project);
}

}  // namespace
}  // namespace brn::cpu
