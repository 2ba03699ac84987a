// The reductions of kChannelsLast by tiles: kRows rows of one vector, which stay in registers.
#pragma once

#include "accumulate.h"
#include "lanes.h"
#include "rows.h"

#include <cstdint>

namespace brn::cpu {
namespace {

// Elements from what is at hand to what is fetched: a tile, or two pages, since prefetchers stop
// where a page ends. GB/s of x or of dy and x out of memory, one thread, float32, without and with
// it, by channels. Moments: 512, 13 and 25; 1,024, 17 and 25. Sums: 512, 6 and 22; 1,024, 10
// and 21. bfloat16 backward, (4, 512, 28, 28): 1,090 us and 560.
template <typename T>
BRN_LANES std::int64_t fetched_ahead(const Rows& rows) {
  constexpr std::int64_t kLeast = 8192 / sizeof(T);
  return kRows * rows.stride > kLeast ? kRows * rows.stride : kLeast;
}

// Deviations of `rows` rows from the first of them, and their squares.
template <typename T>
BRN_LANES LaneSums<T> tile_deviations(const T* x, std::int64_t stride, std::int64_t ahead,
                                      Lanes<T> first, int rows, bool to_l1) {
  fetch_to(to_l1, x + ahead);
  LaneSums<T> sums[2] = {{{}, first - first}, {}};  // of infinity: NaN
  for (int k = 1; k < rows; ++k) {
    fetch_to(to_l1, x + k * stride + ahead);
    const Lanes<T> d = load(x + k * stride) - first;
    sums[k % 2] += LaneSums<T>::of(d, d);
  }
  return sums[0] + sums[1];
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
BRN_LANES void tiled_moments(const Rows& rows, const T* x, const ColumnMoments<T>& totals) {
  const std::int64_t ahead = fetched_ahead<T>(rows);
  for_each_tile<T>(rows, [&](std::int64_t row, std::int64_t height, std::int64_t c,
                             std::int64_t place) BRN_INLINED {
    const T* tile = x + rows.first + row * rows.stride + c;
    const Lanes<T> first = load(tile);
    if (height == kRows) {
      totals.add(row, kRows, c, place, first,
                 tile_deviations(tile, rows.stride, ahead, first, kRows, rows.to_l1));
    } else {
      totals.add(
          row, height, c, place, first,
          tile_deviations(tile, rows.stride, 0, first, static_cast<int>(height), rows.to_l1));
    }
  });
}

template <typename T>
BRN_LANES void tiled_sums(const Rows& rows, const T* dy, const T* x, const RealOf<T>* centres,
                          const ColumnSums<T>& totals) {
  const std::int64_t ahead = fetched_ahead<T>(rows);
  for_each_tile<T>(rows, [&](std::int64_t row, std::int64_t height, std::int64_t c,
                             std::int64_t place) BRN_INLINED {
    const std::int64_t tile = rows.first + row * rows.stride + c;
    const Lanes<T> centre = load_lanes<T>(centres + place);
    LaneSums<T> sums{};
    if (height == kRows) {
      for (int k = 0; k < kRows; ++k) {
        fetch_to(rows.to_l1, dy + tile + k * rows.stride + ahead);
        fetch_to(rows.to_l1, x + tile + k * rows.stride + ahead);
      }
      sums = tile_sums<kRows>(dy + tile, x + tile, rows.stride, centre);
    } else {
      for (std::int64_t k = tile; k < tile + height * rows.stride; k += rows.stride) {
        const Lanes<T> g = load(dy + k);
        sums += LaneSums<T>::of(g, load(x + k) - centre);
      }
    }
    totals.add(row, place, sums);
  });
}

}  // namespace
}  // namespace brn::cpu
