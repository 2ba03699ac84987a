// The rows of kChannelsLast, of at least a vector, and the columns' values.
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
  std::int64_t ahead;  // these as in Part
  bool streamed;
  bool fetch_written;
  bool to_l1;
  bool eight_together;
};

BRN_LANES Rows rows_of(const Part& part) {
  return {part.first + part.begin * part.stride,
          part.end - part.begin,
          part.stride,
          part.width,
          part.ahead,
          part.streamed,
          part.fetch_written,
          part.to_l1,
          part.eight_together};
}

constexpr int kRows = 8;  // that are reduced before they are added to the columns' totals

// Rows whose mean a column's pivot is: one of 64, and 64 at most. Each merge rounds what the mean
// is off the pivot, and dweight has that error times the sum of dy. (32, 16, 64, 64) float32, x of
// mean 0 and dy of mean 3, error of dweight in its last place: pivots of one row 522, of 8 335, of
// 64 90, native 92.
BRN_LANES std::int64_t pivot_rows(const Part& part) {
  const std::int64_t rows = part.end / 64;
  return rows < 1 ? 1 : rows < 64 ? rows : 64;
}

// Whether rows are reduced several at a time, which spares loads and stores of what a column keeps.
// Memory, though, is read fastest in the order in which it lies. One thread, AMD EPYC (Zen 3) with
// AVX2, side by side and row by row, us: (32, 128, 28, 28) float32, forward 4,811 and 3,146,
// backward 8,029 and 4,552; (32, 64, 56, 56) bfloat16, rows of 128 bytes, forward 3,028 and 3,712.
// With AVX-512 it has not been measured, and the tiles are what was tuned there.
template <typename T>
BRN_LANES bool are_reduced_together(const Rows& rows) {
  constexpr std::int64_t kShort = 192 / sizeof(T);
  return BRN_VECTOR_BYTES == 64 || rows.width < kShort;
}

// Whether they are written several at a time, which spares loads of parameters. Inference, as
// above: (32, 128, 28, 28) float32, 3,089 and 1,829, and bfloat16, rows of 256 bytes, 671 and 742;
// (1, 2048, 7, 7) float32, where rows are cut into pieces, 62 and 71. With AVX-512, Emerald Rapids,
// rows that are not made of whole vectors: (8, 127, 17, 17) float32 168 and 108.
template <typename T>
BRN_LANES bool are_written_together(const Rows& rows) {
  constexpr std::int64_t kShort = 256 / sizeof(T);
  const bool whole = rows.width % kLanes<T> == 0;
  return (BRN_VECTOR_BYTES == 64 && whole) || rows.width <= kShort || rows.width < rows.stride;
}

// Elements to what lies `bytes` or more further on among those of the rows, in whole rows.
template <typename T>
BRN_LANES std::int64_t ahead_by(const Rows& rows, std::int64_t bytes) {
  const std::int64_t row = rows.width * static_cast<std::int64_t>(sizeof(T));
  return (bytes + row - 1) / row * rows.stride;
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

template <typename T>
using LaneMoments = SharedMoments<RealOf<T>, Lanes<T>>;

// Moments of the columns over the rows so far, in the order of lanes.
template <typename T>
struct ColumnMoments {
  using Real = RealOf<T>;
  const Real* pivot;
  Real* mean;  // of x - pivot
  Real* m2;

  // `height` rows after the first `row`: sums of their deviations from the first of them and of the
  // squares of those, which are at most kRows times m2.
  BRN_LANES void add(std::int64_t row, std::int64_t height, std::int64_t column, std::int64_t place,
                     Lanes<T> first, LaneSums<T> deviations) const {
    const Lanes<T> step = deviations.values * (Real(1) / static_cast<Real>(height));
    LaneMoments<T> moments{static_cast<Real>(height),
                           (first - load_reals<T>(pivot + column)) + step,
                           deviations.products - deviations.values * step};
    if (row > 0) moments = merge(at(row, place), moments);
    store_lanes(mean + place, moments.mean);
    store_lanes(m2 + place, moments.m2);
  }

  // `height` rows after the first `row`, around the same pivots.
  BRN_LANES void add(std::int64_t row, std::int64_t height, const ColumnMoments& rows,
                     std::int64_t width) const {
    for (std::int64_t place = 0; place < width; place += kLanes<T>) {
      const LaneMoments<T> moments = merge(at(row, place), rows.at(height, place));
      store_lanes(mean + place, moments.mean);
      store_lanes(m2 + place, moments.m2);
    }
  }
  BRN_LANES LaneMoments<T> at(std::int64_t rows, std::int64_t place) const {
    return {static_cast<Real>(rows), load_lanes<T>(mean + place), load_lanes<T>(m2 + place)};
  }

  BRN_LANES void spread(std::int64_t width) const {
    spread_columns<T>(width, mean);
    spread_columns<T>(width, m2);
  }
};

// Sums of the columns over the rows so far, in the order of lanes.
template <typename T>
struct ColumnSums {
  const SumRows<RealOf<T>>& out;

  BRN_LANES void add(std::int64_t row, std::int64_t place, LaneSums<T> sums) const {
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
  }

  BRN_LANES void spread(std::int64_t width) const {
    for (RealOf<T>* row : {out.g, out.g_error, out.gx, out.gx_error}) {
      spread_columns<T>(width, row);
    }
  }
};

}  // namespace
}  // namespace brn::cpu
