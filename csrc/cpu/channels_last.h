// The sweeps of kChannelsLast, for rows of at least a vector. Each lane is a channel; a tile is
// kRows rows of one vector, which stay in registers between its mean and its m2.
#pragma once

#include "../core/math.h"
#include "accumulate.h"
#include "isa.h"
#include "lanes.h"

#include <cstdint>
#include <cstring>

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

template <typename T>
BRN_LANES LaneMoments<T> tile_moments(const T* x, std::int64_t stride, std::int64_t ahead,
                                      Lanes<T> pivot) {
  Lanes<T> u[kRows];
  for (int k = 0; k < kRows; ++k) {
    fetch(x + k * stride + ahead);
    u[k] = load(x + k * stride) - pivot;
  }
  const Lanes<T> mean = sum_of<kRows>(u) * (RealOf<T>(1) / kRows);
  for (int k = 0; k < kRows; ++k) u[k] = (u[k] - mean) * (u[k] - mean);
  return {kRows, mean, sum_of<kRows>(u)};
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

// Values that are kept of each channel.
template <typename Real, int kValues>
struct Kept {
  Real* rows[kValues];

  BRN_LANES Kept at(std::int64_t c) const {
    Kept moved = *this;
    for (Real*& row : moved.rows) row += c;
    return moved;
  }
};

// Calls f(row, height, column, kept) for each tile. Where the width is no multiple of a vector, the
// last one covers columns of the one before it: what is kept of it lies apart meanwhile, and comes
// to the same.
template <int kValues, typename T, typename F>
BRN_LANES void for_each_tile(const Rows& rows, const Kept<RealOf<T>, kValues>& kept, F f) {
  const std::int64_t whole = rows.width / kLanes<T> * kLanes<T>;
  const std::int64_t last = rows.width - kLanes<T>;
  RealOf<T> apart[kValues][kLanes<T>] = {};
  Kept<RealOf<T>, kValues> kept_apart;
  for (int i = 0; i < kValues; ++i) kept_apart.rows[i] = apart[i];
  for (std::int64_t row = 0; row < rows.count; row += kRows) {
    const std::int64_t height = rows.count - row < kRows ? rows.count - row : kRows;
    for (std::int64_t c = 0; c < whole; c += kLanes<T>) f(row, height, c, kept.at(c));
    if (whole < rows.width) f(row, height, last, kept_apart);
  }
  if (whole == rows.width) return;
  for (int i = 0; i < kValues; ++i) std::memcpy(kept.rows[i] + last, apart[i], sizeof(apart[i]));
}

template <typename T>
void wide_moments(const Rows& rows, const T* x, const RealOf<T>* pivot, RealOf<T>* mean,
                  RealOf<T>* m2) {
  const std::int64_t ahead = fetched_ahead<T>(rows);
  const auto add = [&](std::int64_t row, std::int64_t height, std::int64_t c,
                       const Kept<RealOf<T>, 2>& kept) BRN_INLINED {
    const T* tile = x + rows.first + row * rows.stride + c;
    const Lanes<T> pivots = load_reals<T>(pivot + c);
    LaneMoments<T> moments = height == kRows ? tile_moments(tile, rows.stride, ahead, pivots)
                                             : short_moments(tile, rows.stride, pivots, height);
    if (row > 0) {
      moments = merge(
          {static_cast<RealOf<T>>(row), load_reals<T>(kept.rows[0]), load_reals<T>(kept.rows[1])},
          moments);
    }
    store_reals<T>(kept.rows[0], moments.mean);
    store_reals<T>(kept.rows[1], moments.m2);
  };
  for_each_tile<2, T>(rows, {{mean, m2}}, add);
}

template <typename T>
void wide_sums(const Rows& rows, const T* dy, const T* x, const RealOf<T>* centres,
               const SumRows<RealOf<T>>& out) {
  const std::int64_t ahead = fetched_ahead<T>(rows);
  const auto add = [&](std::int64_t row, std::int64_t height, std::int64_t c,
                       const Kept<RealOf<T>, 4>& kept) BRN_INLINED {
    const std::int64_t tile = rows.first + row * rows.stride + c;
    const Lanes<T> centre = load_reals<T>(centres + c);
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
        sums += {g, g * (load(x + k) - centre)};
      }
    }
    ExactSum<Lanes<T>> g{};
    ExactSum<Lanes<T>> gx{};
    if (row > 0) {
      g = {load_reals<T>(kept.rows[0]), load_reals<T>(kept.rows[1])};
      gx = {load_reals<T>(kept.rows[2]), load_reals<T>(kept.rows[3])};
    }
    g.add(sums.g);
    gx.add(sums.gx);
    store_reals<T>(kept.rows[0], g.sum);
    store_reals<T>(kept.rows[1], g.error);
    store_reals<T>(kept.rows[2], gx.sum);
    store_reals<T>(kept.rows[3], gx.error);
  };
  for_each_tile<4, T>(rows, {{out.g, out.g_error, out.gx, out.gx_error}}, add);
}

// What is written goes by kTogether rows of a vector each, which share their parameters. Two
// kilobytes, or those rows, ahead of it lines are fetched; those to be written only where rows are
// long enough for neighbours of a column to lie apart. GB/s of x for y, (32, 1024, 14, 14) float32,
// a row at a time, 4 and 8: 14.9, 17.6 and 15.8.
constexpr int kTogether = 4;

template <typename T>
struct Ahead {
  std::int64_t elements;
  bool written;

  BRN_LANES explicit Ahead(const Rows& rows)
      : elements(kTogether * rows.stride), written(rows.stride * sizeof(T) >= 256) {
    constexpr std::int64_t kLeast = 2048 / sizeof(T);
    if (elements < kLeast) elements = kLeast;
  }
};

// Calls f(element, rows, column) for each vector of columns, kTogether rows at a time.
template <typename T, typename F>
BRN_LANES void for_each_vector(const Rows& rows, F f) {
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

template <typename T>
void wide_normalise(const Rows& rows, const T* x, const Affines<RealOf<T>>& a, T* y) {
  const Ahead<T> ahead(rows);
  const bool streamed =
      rows.streamed && rows.width % kLanes<T> == 0 && is_aligned(y + rows.first, rows.stride);
  const auto normalise = [&](std::int64_t at, std::int64_t height, std::int64_t c) BRN_INLINED {
    const CentredAffine<Lanes<T>> affine{load_reals<T>(a.centre + c), load_reals<T>(a.scale + c),
                                         load_reals<T>(a.shift + c)};
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
  const auto project = [&](std::int64_t at, std::int64_t height, std::int64_t c) BRN_INLINED {
    const Lanes<T> centre = load_reals<T>(centres + c);
    const Projection<Lanes<T>> projection{load_reals<T>(p.mean_g + c), load_reals<T>(p.slope + c),
                                          load_reals<T>(p.scale + c)};
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
