// The reductions of kChannelsLast row by row: what kRows rows come to stays in the L1, for blocks
// of columns.
#pragma once

#include "accumulate.h"
#include "lanes.h"
#include "rows.h"

#include <cstdint>
#include <type_traits>

namespace brn::cpu {
namespace {

// A page of float32 rows; what is kept of them takes two.
constexpr std::int64_t kBlockColumns = 1024;

// Calls f(column, width, place) for blocks of columns; place: where their values lie.
template <typename T, typename F>
BRN_LANES void for_each_block(std::int64_t width, F f) {
  const std::int64_t whole = whole_columns<T>(width);
  for (std::int64_t c = 0; c < whole; c += kBlockColumns) {
    f(c, whole - c < kBlockColumns ? whole - c : kBlockColumns, c);
  }
  if (whole < width) f(width - kLanes<T>, std::int64_t{kLanes<T>}, whole);
}

// Of kRows rows at a time, column by column, the sums of each(element, first, place), where `first`
// is the element of the same column in the first of them. close(row, height, column, place, first,
// sums) takes them. fetch(element) is called with what lies two pages ahead or more, as prefetchers
// stop where a page ends: forward of (32, 256, 14, 14) float32 takes 1,806 us, 1,853 with two
// kilobytes, and 2,129 without (one thread, Zen 3 with AVX2).
template <typename T, typename Fetch, typename Each, typename Close>
BRN_LANES void reduce_row_by_row(const Rows& rows, Fetch fetch, Each each, Close close) {
  const std::int64_t two_pages = ahead_by<T>(rows, 8192);
  RealOf<T> values[kBlockColumns];
  RealOf<T> products[kBlockColumns];
  for (std::int64_t row = 0; row < rows.count; row += kRows) {
    const std::int64_t height = rows.count - row < kRows ? rows.count - row : kRows;
    const std::int64_t ahead = height == kRows ? two_pages : 0;
    for_each_block<T>(rows.width, [&](std::int64_t column, std::int64_t width,
                                      std::int64_t place) BRN_INLINED {
      const std::int64_t first = rows.first + row * rows.stride + column;
      for (std::int64_t k = 0; k < height; ++k) {
        const std::int64_t at = first + k * rows.stride;
        const auto add = [&](auto begins, auto ends) BRN_INLINED {
          for (std::int64_t c = 0; c < width; c += kLanes<T>) {
            fetch(at + c + ahead);
            LaneSums<T> sums = each(at + c, first + c, place + c);
            if constexpr (!begins) {
              sums += LaneSums<T>{load_lanes<T>(values + c), load_lanes<T>(products + c)};
            }
            if constexpr (ends) {
              close(row, height, column + c, place + c, first + c, sums);
            } else {
              store_lanes(values + c, sums.values);
              store_lanes(products + c, sums.products);
            }
          }
        };
        const bool ends = k + 1 == height;
        if (k > 0) {
          ends ? add(std::false_type{}, std::true_type{})
               : add(std::false_type{}, std::false_type{});
        } else {
          ends ? add(std::true_type{}, std::true_type{}) : add(std::true_type{}, std::false_type{});
        }
      }
    });
  }
}

template <typename T>
BRN_LANES void moments_row_by_row(const Rows& rows, const T* x, const ColumnMoments<T>& totals) {
  reduce_row_by_row<T>(
      rows, [&](std::int64_t i) BRN_INLINED { fetch(x + i); },
      [&](std::int64_t i, std::int64_t first, std::int64_t) BRN_INLINED {
        const Lanes<T> d = load(x + i) - load(x + first);
        return LaneSums<T>::of(d, d);
      },
      [&](std::int64_t row, std::int64_t height, std::int64_t column, std::int64_t place,
          std::int64_t first, LaneSums<T> sums)
          BRN_INLINED { totals.add(row, height, column, place, load(x + first), sums); });
}

template <typename T>
BRN_LANES void sums_row_by_row(const Rows& rows, const T* dy, const T* x, const RealOf<T>* centres,
                               const ColumnSums<T>& totals) {
  reduce_row_by_row<T>(
      rows,
      [&](std::int64_t i) BRN_INLINED {
        fetch(dy + i);
        fetch(x + i);
      },
      [&](std::int64_t i, std::int64_t, std::int64_t place) BRN_INLINED {
        return LaneSums<T>::of(load(dy + i), load(x + i) - load_lanes<T>(centres + place));
      },
      [&](std::int64_t row, std::int64_t, std::int64_t, std::int64_t place, std::int64_t,
          LaneSums<T> sums) BRN_INLINED { totals.add(row, place, sums); });
}

}  // namespace
}  // namespace brn::cpu
