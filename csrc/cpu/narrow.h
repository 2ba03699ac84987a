// The sweeps of kChannelsLast for rows narrower than a vector: as many rows as fill whole vectors
// make one wide row. What is left over in the end is less than that; it is copied and filled up.
#pragma once

#include "accumulate.h"
#include "channels_last.h"
#include "isa.h"
#include "lanes.h"
#include "rows.h"

#include <cstdint>
#include <cstring>

namespace brn::cpu {
namespace {

template <typename T>
struct Narrow {
  using Real = RealOf<T>;
  static constexpr int kMost = kLanes<T> * kLanes<T>;

  std::int64_t width;
  std::int64_t fold;  // rows in a wide one
  Rows wide;
  std::int64_t rest;  // elements after the last wide row
  std::int64_t rest_at;

  BRN_LANES explicit Narrow(const Rows& rows) : width(rows.width), fold(kLanes<T>) {
    while (fold % 2 == 0 && width * (fold / 2) % kLanes<T> == 0) fold /= 2;
    wide = rows;
    wide.count /= fold;
    wide.stride *= fold;
    wide.width *= fold;
    if (wide.width < kLanes<T> || wide.width > kMost) __builtin_unreachable();
    rest = rows.count % fold * rows.width;
    rest_at = wide.first + wide.count * wide.stride;
  }
  BRN_LANES Rows rest_row() const {
    Rows row = wide;
    row.first = 0;
    row.count = 1;
    row.stride = wide.width;
    row.streamed = false;
    return row;
  }

  // The values of a wide row's columns.
  BRN_LANES const Real* repeat(const Real* values, Real* repeated) const {
    for (std::int64_t k = 0, w = 0; k < wide.width; ++k, w = w + 1 < width ? w + 1 : 0) {
      repeated[k] = values[w];
    }
    return repeated;
  }
  BRN_LANES const Real* widen(const Real* values, Real* arranged) const {
    repeat(values, arranged);
    arrange_columns<T>(wide.width, arranged);
    return arranged;
  }
  BRN_LANES const T* widen_rest(const T* x, T* row) const {
    std::memset(row, 0, static_cast<std::size_t>(wide.width) * sizeof(T));
    std::memcpy(row, x + rest_at, static_cast<std::size_t>(rest) * sizeof(T));
    return row;
  }
};

template <typename T>
void narrow_moments(const Rows& rows, const T* x, const RealOf<T>* pivot, RealOf<T>* mean,
                    RealOf<T>* m2) {
  using Real = RealOf<T>;
  const Narrow<T> narrow(rows);
  Real pivots[Narrow<T>::kMost] = {};
  Real means[2][Narrow<T>::kMost];  // of the wide rows, of the rest
  Real m2s[2][Narrow<T>::kMost];
  T row[Narrow<T>::kMost];
  narrow.repeat(pivot, pivots);
  wide_moments(narrow.wide, x, pivots, means[0], m2s[0]);
  if (narrow.rest > 0)
    wide_moments(narrow.rest_row(), narrow.widen_rest(x, row), pivots, means[1], m2s[1]);
  const Real count = static_cast<Real>(narrow.wide.count);
  const std::int64_t whole = narrow.wide.count > 0 ? narrow.wide.width : 0;
  for (std::int64_t c = 0; c < rows.width; ++c) {
    SharedMoments<Real, Real> moments{0, 0, 0};
    for (std::int64_t k = c; k < whole; k += rows.width)
      moments = merge(moments, {count, means[0][k], m2s[0][k]});
    for (std::int64_t k = c; k < narrow.rest; k += rows.width)
      moments = merge(moments, {Real(1), means[1][k], m2s[1][k]});
    mean[c] = moments.mean;
    m2[c] = moments.m2;
  }
}

template <typename T>
void narrow_sums(const Rows& rows, const T* dy, const T* x, const RealOf<T>* centres,
                 const SumRows<RealOf<T>>& out) {
  using Real = RealOf<T>;
  const Narrow<T> narrow(rows);
  Real repeated[Narrow<T>::kMost];
  Real sums[2][4][Narrow<T>::kMost];  // of the wide rows, of the rest
  T row[2][Narrow<T>::kMost];
  const Real* wide = narrow.widen(centres, repeated);
  wide_sums(narrow.wide, dy, x, wide, {sums[0][0], sums[0][1], sums[0][2], sums[0][3]});
  if (narrow.rest > 0) {
    wide_sums(narrow.rest_row(), narrow.widen_rest(dy, row[0]), narrow.widen_rest(x, row[1]), wide,
              {sums[1][0], sums[1][1], sums[1][2], sums[1][3]});
  }
  const std::int64_t ends[2] = {narrow.wide.count > 0 ? narrow.wide.width : 0, narrow.rest};
  for (std::int64_t c = 0; c < rows.width; ++c) {
    ExactSum<Real> g{};
    ExactSum<Real> gx{};
    for (int i = 0; i < 2; ++i) {
      for (std::int64_t k = c; k < ends[i]; k += rows.width) {
        g.add(sums[i][0][k]);
        g.error += sums[i][1][k];
        gx.add(sums[i][2][k]);
        gx.error += sums[i][3][k];
      }
    }
    out.g[c] = g.sum;
    out.g_error[c] = g.error;
    out.gx[c] = gx.sum;
    out.gx_error[c] = gx.error;
  }
}

template <typename T>
void narrow_normalise(const Rows& rows, const T* x, const Affines<RealOf<T>>& a, T* y) {
  const Narrow<T> narrow(rows);
  RealOf<T> repeated[3][Narrow<T>::kMost];
  T row[2][Narrow<T>::kMost];
  const Affines<RealOf<T>> wide{narrow.widen(a.centre, repeated[0]),
                                narrow.widen(a.scale, repeated[1]),
                                narrow.widen(a.shift, repeated[2])};
  wide_normalise(narrow.wide, x, wide, y);
  if (narrow.rest == 0) return;
  wide_normalise(narrow.rest_row(), narrow.widen_rest(x, row[0]), wide, row[1]);
  std::memcpy(y + narrow.rest_at, row[1], static_cast<std::size_t>(narrow.rest) * sizeof(T));
}

template <typename T>
void narrow_project(const Rows& rows, const T* dy, const T* x, const RealOf<T>* centres,
                    const Projections<RealOf<T>>& p, T* dx) {
  const Narrow<T> narrow(rows);
  RealOf<T> repeated[4][Narrow<T>::kMost];
  T row[3][Narrow<T>::kMost];
  const RealOf<T>* wide_centres = narrow.widen(centres, repeated[0]);
  const Projections<RealOf<T>> wide{narrow.widen(p.mean_g, repeated[1]),
                                    narrow.widen(p.slope, repeated[2]),
                                    narrow.widen(p.scale, repeated[3])};
  wide_project(narrow.wide, dy, x, wide_centres, wide, dx);
  if (narrow.rest == 0) return;
  wide_project(narrow.rest_row(), narrow.widen_rest(dy, row[0]), narrow.widen_rest(x, row[1]),
               wide_centres, wide, row[2]);
  std::memcpy(dx + narrow.rest_at, row[2], static_cast<std::size_t>(narrow.rest) * sizeof(T));
}

}  // namespace
}  // namespace brn::cpu
