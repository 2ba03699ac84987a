// The sweeps of kChannelsLast, for rows of at least a vector. Each lane is a channel.
#pragma once

#include "accumulate.h"
#include "isa.h"
#include "lanes.h"
#include "row_by_row.h"
#include "rows.h"
#include "tiles.h"

#include <cstdint>

namespace brn::cpu {
namespace {

// What so many rows come to is merged before it is added to what came before them: each merge
// rounds the mean once more, and where there are many, that adds up. (4096, 24) float32, dy of mean
// 3, error of dweight in last places (the parity harness's measure): 10, and 3 with it, plain
// PyTorch 751.
constexpr std::int64_t kBlockRows = 256;

template <typename T>
void wide_moments(const Rows& rows, const T* x, const RealOf<T>* pivot, RealOf<T>* mean,
                  RealOf<T>* m2) {
  const ColumnMoments<T> totals{pivot, mean, m2};
  RealOf<T> means[kBlockColumns];
  RealOf<T> m2s[kBlockColumns];
  const ColumnMoments<T> of_block{pivot, means, m2s};
  const std::int64_t height = rows.width <= kBlockColumns ? kBlockRows : rows.count;
  for (std::int64_t row = 0; row < rows.count; row += height) {
    Rows block = rows;
    block.first += row * rows.stride;
    block.count = rows.count - row < height ? rows.count - row : height;
    const ColumnMoments<T>& to = row > 0 ? of_block : totals;
    are_reduced_together<T>(rows) ? tiled_moments(block, x, to) : moments_row_by_row(block, x, to);
    if (row > 0) totals.add(row, block.count, of_block, rows.width);
  }
  if (rows.count > 0) totals.spread(rows.width);
}

template <typename T>
void wide_sums(const Rows& rows, const T* dy, const T* x, const RealOf<T>* centres,
               const SumRows<RealOf<T>>& out) {
  const ColumnSums<T> totals{out};
  are_reduced_together<T>(rows) ? tiled_sums(rows, dy, x, centres, totals)
                                : sums_row_by_row(rows, dy, x, centres, totals);
  if (rows.count > 0) totals.spread(rows.width);
}

// What is written goes by rows_together() rows of a vector each, which share their parameters, or
// row by row. What lies Part::ahead further on is fetched, or so many rows, whichever is more;
// lines to be written, if at all, only where rows that go together are long enough for neighbours
// of a column to lie apart: in rows of 256 bytes, inference of (4, 128, 28, 28) bfloat16 takes 52
// us, and 65 with it. GB/s of x for y, (32, 1024, 14, 14) float32 with AVX-512, a row at a time, 4
// and 8: 14.9, 17.6 and 15.8.
constexpr int kTogether = 4;
constexpr int kEightTogether = 8;

// Rows that are written together, if any are. Eight against four on Zen 5, inference, float32: (4,
// 1024, 14, 14) 1.16 times as fast, but (4, 64, 56, 56), rows of 256 bytes, 0.86, and (4096, 1024)
// past the caches 0.88.
template <typename T>
BRN_LANES int rows_together(const Rows& rows) {
  const bool more = rows.eight_together && !rows.streamed && rows.stride * sizeof(T) >= 1024;
  return more ? kEightTogether : kTogether;
}

template <typename T>
struct Ahead {
  std::int64_t elements;
  bool written = false;
  bool to_l1;

  BRN_LANES explicit Ahead(const Rows& rows)
      : elements(ahead_by<T>(rows, rows.ahead * sizeof(T))), to_l1(rows.to_l1) {
    if (!are_written_together<T>(rows)) return;
    const std::int64_t together = rows_together<T>(rows) * rows.stride;
    if (elements < together) elements = together;
    written = rows.fetch_written && rows.stride * sizeof(T) >= 512;
  }

  BRN_LANES void operator()(const T* x) const { fetch_to(to_l1, x + elements); }
};

// Calls f(element, rows, place) for each vector of columns, of one row or of rows_together().
template <typename T, typename F>
BRN_LANES void for_each_vector(const Rows& rows, F f) {
  const std::int64_t whole = whole_columns<T>(rows.width);
  const auto each = [&](std::int64_t row, std::int64_t height) BRN_INLINED {
    const std::int64_t at = rows.first + row * rows.stride;
    for (std::int64_t c = 0; c < whole; c += kLanes<T>) f(at + c, height, c);
    // Over columns that are done, with the same result.
    if (whole < rows.width) f(at + rows.width - kLanes<T>, height, whole);
  };
  std::int64_t row = 0;
  if (are_written_together<T>(rows)) {
    if (rows_together<T>(rows) == kEightTogether) {
      for (; row + kEightTogether <= rows.count; row += kEightTogether) each(row, kEightTogether);
    }
    for (; row + kTogether <= rows.count; row += kTogether) each(row, kTogether);
  }
  for (; row < rows.count; ++row) each(row, 1);
}

template <typename T>
void wide_normalise(const Rows& rows, const T* x, const Affines<RealOf<T>>& a, T* y) {
  const Ahead<T> ahead(rows);
  const bool streamed =
      rows.streamed && rows.width % kLanes<T> == 0 && is_aligned(y + rows.first, rows.stride);
  const auto normalise = [&](std::int64_t at, std::int64_t height, std::int64_t place) BRN_INLINED {
    const Affine<Lanes<T>> affine{load_lanes<T>(a.centre + place), load_lanes<T>(a.scale + place),
                                  load_lanes<T>(a.shift + place)};
    for (std::int64_t k = 0; k < height; ++k, at += rows.stride) {
      ahead(x + at);
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
      ahead(dy + at);
      ahead(x + at);
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
