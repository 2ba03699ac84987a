// The sweeps over a part of a slab, written once for every instruction set, layout and element type.
//
// Both layouts reduce by the same tile: kRows vectors, `stride` elements apart, that stay in registers between the mean and
// the squared deviations. In kChannelsFirst a tile is one stretch of a channel and its lanes are folded at the end of the
// part; in kChannelsLast it is kRows pixels and each lane is a channel.
//
// Functions with a scalar signature are not called from here: the linker could take this file's copy of an inline one, with
// this file's instructions, for every processor.
#pragma once

#include "../core/math.h"
#include "isa.h"
#include "lanes.h"

namespace brn::cpu {
namespace {

constexpr int kRows = 8;

template <typename T>
constexpr std::int64_t kTile = kRows * kLanes<RealOf<T>>;

// merge() of math.h, where the lanes of mean and m2 have one count between them.
template <typename Real, typename Value>
struct SharedMoments {
  Real count;
  Value mean;
  Value m2;
};
template <typename Real, typename Value>
BRN_LANES SharedMoments<Real, Value> merge(SharedMoments<Real, Value> a, SharedMoments<Real, Value> b) {
  const Real count = a.count + b.count;
  const Real weight = b.count / count;
  const Value delta = b.mean - a.mean;
  return {count, a.mean + delta * weight, a.m2 + b.m2 + delta * delta * (a.count * weight)};
}
template <typename Real>
using LaneMoments = SharedMoments<Real, Lanes<Real>>;

// A sum and the rounding errors it has made (Knuth's two-sum).
template <typename Value>
struct ExactSum {
  Value sum;
  Value error;

  BRN_LANES void add(Value v) {
    const Value next = sum + v;
    const Value added = next - sum;
    error += (sum - (next - added)) + (v - added);
    sum = next;
  }
};

template <typename Real>
BRN_LANES double total(Real sum, Real error) {
  return error == error ? static_cast<double>(sum) + static_cast<double>(error) : static_cast<double>(sum);  // inf stays
}

// ---- tiles

template <typename Value>
BRN_LANES Value sum_of_rows(const Value (&v)[kRows]) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

template <typename T>
BRN_LANES LaneMoments<RealOf<T>> tile_moments(const T* x, std::int64_t stride, Lanes<RealOf<T>> pivot) {
  using Real = RealOf<T>;
  Lanes<Real> u[kRows];
  for (int k = 0; k < kRows; ++k) u[k] = load(x + k * stride) - pivot;
  const Lanes<Real> mean = sum_of_rows(u) * (Real(1) / kRows);
  for (int k = 0; k < kRows; ++k) u[k] = (u[k] - mean) * (u[k] - mean);
  return {kRows, mean, sum_of_rows(u)};
}

// The same of fewer rows.
template <typename T>
BRN_LANES LaneMoments<RealOf<T>> short_moments(const T* x, std::int64_t rows, std::int64_t stride, Lanes<RealOf<T>> pivot) {
  using Real = RealOf<T>;
  Lanes<Real> mean{};
  Lanes<Real> m2{};
  for (std::int64_t k = 0; k < rows; ++k) mean += load(x + k * stride) - pivot;
  mean *= Real(1) / static_cast<Real>(rows);
  for (std::int64_t k = 0; k < rows; ++k) {
    const Lanes<Real> deviation = (load(x + k * stride) - pivot) - mean;
    m2 += deviation * deviation;
  }
  return {static_cast<Real>(rows), mean, m2};
}

template <typename Real>
struct LaneSums {
  Lanes<Real> g;
  Lanes<Real> gx;
};

template <typename Real>
struct LaneCentre {
  Lanes<Real> pivot;
  Lanes<Real> offset;

  BRN_LANES Lanes<Real> operator()(Lanes<Real> x) const { return (x - pivot) - offset; }
};

template <typename T>
BRN_LANES LaneSums<RealOf<T>> tile_sums(const T* dy, const T* x, std::int64_t stride, const LaneCentre<RealOf<T>>& centre) {
  using Real = RealOf<T>;
  Lanes<Real> g[kRows];
  Lanes<Real> gx[kRows];
  for (int k = 0; k < kRows; ++k) {
    g[k] = load(dy + k * stride);
    gx[k] = g[k] * centre(load(x + k * stride));
  }
  return {sum_of_rows(g), sum_of_rows(gx)};
}

// ---- kChannelsFirst: a part is runs of one channel, each in one plane

template <typename F>
BRN_LANES void for_each_run(const Part& part, F f) {
  std::int64_t n = part.begin / part.plane;
  std::int64_t s = part.begin % part.plane;
  for (std::int64_t left = part.end - part.begin; left > 0; ++n, s = 0) {
    const std::int64_t length = part.plane - s < left ? part.plane - s : left;
    f(part.first + n * part.stride + s, length);
    left -= length;
  }
}

// Ends of runs that do not fill a tile wait here for the ends of the next ones.
template <typename T>
struct Remainder {
  T values[2 * kTile<T>];
  std::int64_t count = 0;

  BRN_LANES void append(const T* from, std::int64_t n) {
    std::memcpy(values + count, from, static_cast<std::size_t>(n) * sizeof(T));
    count += n;
  }
  BRN_LANES bool full() const { return count >= kTile<T>; }
  BRN_LANES void drop_tile() {
    count -= kTile<T>;
    std::memcpy(values, values + kTile<T>, static_cast<std::size_t>(count) * sizeof(T));
  }
};

// The moments of a channel that is spread over the lanes.
template <typename Real>
BRN_LANES SharedMoments<Real, Real> fold(LaneMoments<Real> lanes) {
  SharedMoments<Real, Real> parts[kLanes<Real>];
  for (int k = 0; k < kLanes<Real>; ++k) parts[k] = {lanes.count, lanes.mean[k], lanes.m2[k]};
  for (int half = kLanes<Real> / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) parts[k] = merge(parts[k], parts[k + half]);
  }
  return parts[0];
}

template <typename T>
void channel_moments(const Part& part, const T* x, const RealOf<T>* pivot, RealOf<T>* mean, RealOf<T>* m2) {
  using Real = RealOf<T>;
  const Lanes<Real> pivots = broadcast(*pivot);
  LaneMoments<Real> lanes{0, {}, {}};
  Remainder<T> rest;
  for_each_run(part, [&](std::int64_t at, std::int64_t length) {
    std::int64_t i = 0;
    for (; i + kTile<T> <= length; i += kTile<T>) {
      lanes = merge(lanes, tile_moments(x + at + i, kLanes<Real>, pivots));
    }
    rest.append(x + at + i, length - i);
    if (rest.full()) {
      lanes = merge(lanes, tile_moments(rest.values, kLanes<Real>, pivots));
      rest.drop_tile();
    }
  });

  const std::int64_t vectors = rest.count / kLanes<Real>;
  if (vectors > 0) lanes = merge(lanes, short_moments(rest.values, vectors, kLanes<Real>, pivots));
  SharedMoments<Real, Real> moments{0, 0, 0};
  if (lanes.count > 0) moments = fold(lanes);
  const std::int64_t i = vectors * kLanes<Real>;
  if (i < rest.count) {
    const int n = static_cast<int>(rest.count - i);
    const Lanes<Real> u = load_first(rest.values + i, n) - pivots;
    Real sum = 0;
    for (int k = 0; k < n; ++k) sum += u[k];
    SharedMoments<Real, Real> last{static_cast<Real>(n), sum / static_cast<Real>(n), 0};
    for (int k = 0; k < n; ++k) last.m2 += (u[k] - last.mean) * (u[k] - last.mean);
    moments = merge(moments, last);
  }
  *mean = moments.mean;
  *m2 = moments.m2;
}

template <typename T>
void channel_sums(const Part& part, const T* dy, const T* x, const Centres<RealOf<T>>& centres, double* g, double* gx) {
  using Real = RealOf<T>;
  const LaneCentre<Real> centre{broadcast(*centres.pivot), broadcast(*centres.offset)};
  ExactSum<Lanes<Real>> sum_g{};
  ExactSum<Lanes<Real>> sum_gx{};
  const auto add = [&](LaneSums<Real> tile) {
    sum_g.add(tile.g);
    sum_gx.add(tile.gx);
  };
  Remainder<T> rest_dy;
  Remainder<T> rest_x;
  for_each_run(part, [&](std::int64_t at, std::int64_t length) {
    std::int64_t i = 0;
    for (; i + kTile<T> <= length; i += kTile<T>) add(tile_sums(dy + at + i, x + at + i, kLanes<Real>, centre));
    rest_dy.append(dy + at + i, length - i);
    rest_x.append(x + at + i, length - i);
    if (rest_x.full()) {
      add(tile_sums(rest_dy.values, rest_x.values, kLanes<Real>, centre));
      rest_dy.drop_tile();
      rest_x.drop_tile();
    }
  });
  for (std::int64_t i = 0; i < rest_x.count; i += kLanes<Real>) {
    const std::int64_t n = rest_x.count - i < kLanes<Real> ? rest_x.count - i : kLanes<Real>;
    const Lanes<Real> v = load_first(rest_dy.values + i, n);
    Lanes<Real> u = centre(load_first(rest_x.values + i, n));
    for (std::int64_t k = n; k < kLanes<Real>; ++k) u[k] = 0;
    add({v, v * u});
  }
  *g = 0;
  *gx = 0;
  for (int k = 0; k < kLanes<Real>; ++k) {
    *g += total(sum_g.sum[k], sum_g.error[k]);
    *gx += total(sum_gx.sum[k], sum_gx.error[k]);
  }
}

// Calls f(i, store) for vectors that cover [0, length), the last of them over part of the one before it.
template <typename T, typename F, typename Rest>
BRN_LANES void cover(std::int64_t length, F whole, Rest rest) {
  constexpr int kStep = kLanes<RealOf<T>>;
  std::int64_t i = 0;
  for (; i + 4 * kStep <= length; i += 4 * kStep) {
    for (int k = 0; k < 4; ++k) whole(i + k * kStep);
  }
  for (; i + kStep <= length; i += kStep) whole(i);
  if (i == length) return;
  if (length >= kStep) {
    whole(length - kStep);
  } else {
    rest(i, length - i);
  }
}

template <typename T>
void channel_normalise(const Part& part, const T* x, const Affines<RealOf<T>>& a, T* y) {
  using Real = RealOf<T>;
  const Affine<Lanes<Real>> affine{broadcast(*a.pivot), broadcast(*a.offset), broadcast(*a.scale), broadcast(*a.shift)};
  for_each_run(part, [&](std::int64_t at, std::int64_t length) {
    cover<T>(
        length, [&](std::int64_t i) { store(y + at + i, apply(affine, load(x + at + i))); },
        [&](std::int64_t i, std::int64_t n) { store_first(y + at + i, apply(affine, load_first(x + at + i, n)), n); });
  });
}

template <typename T>
void channel_project(const Part& part, const T* dy, const T* x, const Centres<RealOf<T>>& centres,
                     const Projections<RealOf<T>>& p, T* dx) {
  using Real = RealOf<T>;
  const LaneCentre<Real> centre{broadcast(*centres.pivot), broadcast(*centres.offset)};
  const Projection<Lanes<Real>> projection{broadcast(*p.mean_g), broadcast(*p.slope), broadcast(*p.scale)};
  for_each_run(part, [&](std::int64_t at, std::int64_t length) {
    cover<T>(
        length,
        [&](std::int64_t i) { store(dx + at + i, apply(projection, load(dy + at + i), centre(load(x + at + i)))); },
        [&](std::int64_t i, std::int64_t n) {
          const Lanes<Real> u = centre(load_first(x + at + i, n));
          store_first(dx + at + i, apply(projection, load_first(dy + at + i, n), u), n);
        });
  });
}

// ---- kChannelsLast: a part is rows of `width` channels. `column` counts from the slab's first channel.

struct Rows {
  std::int64_t first;
  std::int64_t count;
  std::int64_t stride;
  std::int64_t width;
};

BRN_LANES Rows rows_of(const Part& part) {
  return {part.first + part.begin * part.stride, part.end - part.begin, part.stride, part.width};
}

// Calls f(column, groups) for stretches of whole vectors. Where the width is no multiple of a vector, the last one is a
// stretch of its own over columns that were done before, with the same result.
template <typename Real, typename F>
BRN_LANES void for_each_stretch(std::int64_t width, F f) {
  const std::int64_t groups = width / kLanes<Real>;
  f(std::int64_t{0}, groups);
  if (groups * kLanes<Real> < width) f(width - kLanes<Real>, std::int64_t{1});
}

template <typename T>
void wide_moments(const Rows& rows, const T* x, const RealOf<T>* pivot, RealOf<T>* mean, RealOf<T>* m2) {
  using Real = RealOf<T>;
  for_each_stretch<Real>(rows.width, [&](std::int64_t column, std::int64_t groups) {
    for (std::int64_t row = 0; row < rows.count; row += kRows) {
      const T* tile = x + rows.first + row * rows.stride;
      const Real before = static_cast<Real>(row);
      const std::int64_t height = rows.count - row < kRows ? rows.count - row : kRows;
      for (std::int64_t c = column; c < column + groups * kLanes<Real>; c += kLanes<Real>) {
        LaneMoments<Real> moments = height == kRows ? tile_moments(tile + c, rows.stride, load(pivot + c))
                                                    : short_moments(tile + c, height, rows.stride, load(pivot + c));
        if (row > 0) moments = merge({before, load(mean + c), load(m2 + c)}, moments);
        store(mean + c, moments.mean);
        store(m2 + c, moments.m2);
      }
    }
  });
}

// Rows narrower than a vector: as many of them as fill whole vectors make a wide row.
template <typename Real>
struct Narrow {
  static constexpr int kMost = kLanes<Real> * kLanes<Real>;
  int fold;   // rows in a wide one
  Rows wide;
  std::int64_t rest;  // elements after the last wide row

  BRN_LANES explicit Narrow(const Rows& rows) : fold(kLanes<Real>) {
    const int width = static_cast<int>(rows.width);
    while (fold % 2 == 0 && width * (fold / 2) % kLanes<Real> == 0) fold /= 2;
    wide = {rows.first, rows.count / fold, rows.stride * fold, rows.width * fold};
    rest = rows.count % fold * rows.width;
  }
  BRN_LANES void widen(const Real* narrow, Real* repeated) const {
    const std::int64_t width = wide.width / fold;
    for (std::int64_t c = 0; c < wide.width; ++c) repeated[c] = narrow[c % width];
  }
  BRN_LANES std::int64_t rest_begin() const { return wide.first + wide.count * wide.stride; }
};

template <typename T>
void stripe_moments(const Part& part, const T* x, const RealOf<T>* pivot, RealOf<T>* mean, RealOf<T>* m2) {
  using Real = RealOf<T>;
  const Rows rows = rows_of(part);
  if (rows.width >= kLanes<Real>) return wide_moments(rows, x, pivot, mean, m2);

  const Narrow<Real> narrow(rows);
  Real pivots[Narrow<Real>::kMost] = {};
  Real means[Narrow<Real>::kMost];
  Real m2s[Narrow<Real>::kMost];
  narrow.widen(pivot, pivots);
  wide_moments(narrow.wide, x, pivots, means, m2s);
  const T* last = x + narrow.rest_begin();
  for (std::int64_t c = 0; c < rows.width; ++c) {
    SharedMoments<Real, Real> moments{0, 0, 0};
    for (std::int64_t w = c; narrow.wide.count > 0 && w < narrow.wide.width; w += rows.width) {
      moments = merge(moments, {static_cast<Real>(narrow.wide.count), means[w], m2s[w]});
    }
    for (std::int64_t w = c; w < narrow.rest; w += rows.width) {
      moments = merge(moments, {Real(1), (load_first(last + w, 1) - pivot[c])[0], Real(0)});
    }
    mean[c] = moments.mean;
    m2[c] = moments.m2;
  }
}

template <typename T>
void wide_sums(const Rows& rows, const T* dy, const T* x, const Centres<RealOf<T>>& centres, double* g, double* gx) {
  using Real = RealOf<T>;
  Real state[4][kMaxWidth];
  for_each_stretch<Real>(rows.width, [&](std::int64_t column, std::int64_t groups) {
    for (std::int64_t row = 0; row < rows.count; row += kRows) {
      const std::int64_t tile = rows.first + row * rows.stride;
      const std::int64_t height = rows.count - row < kRows ? rows.count - row : kRows;
      for (std::int64_t c = column; c < column + groups * kLanes<Real>; c += kLanes<Real>) {
        const LaneCentre<Real> centre{load(centres.pivot + c), load(centres.offset + c)};
        LaneSums<Real> sums{};
        if (height == kRows) {
          sums = tile_sums(dy + tile + c, x + tile + c, rows.stride, centre);
        } else {
          for (std::int64_t k = 0; k < height; ++k) {
            const Lanes<Real> v = load(dy + tile + k * rows.stride + c);
            sums = {sums.g + v, sums.gx + v * centre(load(x + tile + k * rows.stride + c))};
          }
        }
        ExactSum<Lanes<Real>> sum_g{sums.g, {}};
        ExactSum<Lanes<Real>> sum_gx{sums.gx, {}};
        if (row > 0) {
          sum_g = {load(state[0] + c), load(state[1] + c)};
          sum_gx = {load(state[2] + c), load(state[3] + c)};
          sum_g.add(sums.g);
          sum_gx.add(sums.gx);
        }
        store(state[0] + c, sum_g.sum);
        store(state[1] + c, sum_g.error);
        store(state[2] + c, sum_gx.sum);
        store(state[3] + c, sum_gx.error);
      }
    }
  });
  for (std::int64_t c = 0; c < rows.width; ++c) {
    g[c] = rows.count > 0 ? total(state[0][c], state[1][c]) : 0;
    gx[c] = rows.count > 0 ? total(state[2][c], state[3][c]) : 0;
  }
}

template <typename T>
void stripe_sums(const Part& part, const T* dy, const T* x, const Centres<RealOf<T>>& centres, double* g, double* gx) {
  using Real = RealOf<T>;
  const Rows rows = rows_of(part);
  if (rows.width >= kLanes<Real>) return wide_sums(rows, dy, x, centres, g, gx);

  const Narrow<Real> narrow(rows);
  Real pivots[Narrow<Real>::kMost];
  Real offsets[Narrow<Real>::kMost];
  double gs[Narrow<Real>::kMost];
  double gxs[Narrow<Real>::kMost];
  narrow.widen(centres.pivot, pivots);
  narrow.widen(centres.offset, offsets);
  wide_sums(narrow.wide, dy, x, {pivots, offsets}, gs, gxs);
  const std::int64_t last = narrow.rest_begin();
  for (std::int64_t c = 0; c < rows.width; ++c) {
    g[c] = 0;
    gx[c] = 0;
    for (std::int64_t w = c; w < narrow.wide.width; w += rows.width) {
      g[c] += gs[w];
      gx[c] += gxs[w];
    }
    for (std::int64_t w = c; w < narrow.rest; w += rows.width) {
      const Real v = load_first(dy + last + w, 1)[0];
      g[c] += static_cast<double>(v);
      gx[c] += static_cast<double>(v * ((load_first(x + last + w, 1)[0] - centres.pivot[c]) - centres.offset[c]));
    }
  }
}

// Calls whole(element, column) or rest(element, column, n), some rows at a time for each vector of columns, so that its
// parameters stay in registers.
template <typename T, typename F>
BRN_LANES void for_each_vector(const Rows& rows, F f) {
  constexpr int kTogether = 4;
  using Real = RealOf<T>;
  for (std::int64_t row = 0; row < rows.count; row += kTogether) {
    const std::int64_t height = rows.count - row < kTogether ? rows.count - row : kTogether;
    for_each_stretch<Real>(rows.width, [&](std::int64_t column, std::int64_t groups) {
      for (std::int64_t c = column; c < column + groups * kLanes<Real>; c += kLanes<Real>) {
        f(rows.first + row * rows.stride + c, height, c);
      }
    });
  }
}

template <typename T>
void wide_normalise(const Rows& rows, const T* x, const Affines<RealOf<T>>& a, T* y) {
  for_each_vector<T>(rows, [&](std::int64_t at, std::int64_t height, std::int64_t c) {
    const Affine<Lanes<RealOf<T>>> affine{load(a.pivot + c), load(a.offset + c), load(a.scale + c), load(a.shift + c)};
    for (std::int64_t k = 0; k < height; ++k, at += rows.stride) store(y + at, apply(affine, load(x + at)));
  });
}

template <typename T>
void stripe_normalise(const Part& part, const T* x, const Affines<RealOf<T>>& a, T* y) {
  using Real = RealOf<T>;
  const Rows rows = rows_of(part);
  if (rows.width >= kLanes<Real>) return wide_normalise(rows, x, a, y);

  const Narrow<Real> narrow(rows);
  Real repeated[4][Narrow<Real>::kMost];
  narrow.widen(a.pivot, repeated[0]);
  narrow.widen(a.offset, repeated[1]);
  narrow.widen(a.scale, repeated[2]);
  narrow.widen(a.shift, repeated[3]);
  wide_normalise(narrow.wide, x, {repeated[0], repeated[1], repeated[2], repeated[3]}, y);
  for (std::int64_t w = 0; w < narrow.rest; w += kLanes<Real>) {
    const Affine<Lanes<Real>> affine{load(repeated[0] + w), load(repeated[1] + w), load(repeated[2] + w),
                                     load(repeated[3] + w)};
    const std::int64_t n = narrow.rest - w < kLanes<Real> ? narrow.rest - w : kLanes<Real>;
    const std::int64_t at = narrow.rest_begin() + w;
    store_first(y + at, apply(affine, load_first(x + at, n)), n);
  }
}

template <typename T>
void wide_project(const Rows& rows, const T* dy, const T* x, const Centres<RealOf<T>>& centres,
                  const Projections<RealOf<T>>& p, T* dx) {
  using Real = RealOf<T>;
  for_each_vector<T>(rows, [&](std::int64_t at, std::int64_t height, std::int64_t c) {
    const LaneCentre<Real> centre{load(centres.pivot + c), load(centres.offset + c)};
    const Projection<Lanes<Real>> projection{load(p.mean_g + c), load(p.slope + c), load(p.scale + c)};
    for (std::int64_t k = 0; k < height; ++k, at += rows.stride) {
      store(dx + at, apply(projection, load(dy + at), centre(load(x + at))));
    }
  });
}

template <typename T>
void stripe_project(const Part& part, const T* dy, const T* x, const Centres<RealOf<T>>& centres,
                    const Projections<RealOf<T>>& p, T* dx) {
  using Real = RealOf<T>;
  const Rows rows = rows_of(part);
  if (rows.width >= kLanes<Real>) return wide_project(rows, dy, x, centres, p, dx);

  const Narrow<Real> narrow(rows);
  Real repeated[5][Narrow<Real>::kMost];
  narrow.widen(centres.pivot, repeated[0]);
  narrow.widen(centres.offset, repeated[1]);
  narrow.widen(p.mean_g, repeated[2]);
  narrow.widen(p.slope, repeated[3]);
  narrow.widen(p.scale, repeated[4]);
  wide_project(narrow.wide, dy, x, {repeated[0], repeated[1]}, {repeated[2], repeated[3], repeated[4]}, dx);
  for (std::int64_t w = 0; w < narrow.rest; w += kLanes<Real>) {
    const LaneCentre<Real> centre{load(repeated[0] + w), load(repeated[1] + w)};
    const Projection<Lanes<Real>> projection{load(repeated[2] + w), load(repeated[3] + w), load(repeated[4] + w)};
    const std::int64_t n = narrow.rest - w < kLanes<Real> ? narrow.rest - w : kLanes<Real>;
    const std::int64_t at = narrow.rest_begin() + w;
    store_first(dx + at, apply(projection, load_first(dy + at, n), centre(load_first(x + at, n))), n);
  }
}

// ---- the table

template <typename T>
struct Entry {
  using Real = RealOf<T>;

  static void pivots(const Part& part, const T* x, Real* pivot) {
    for (std::int64_t c = 0; c < part.width; c += kLanes<Real>) {
      const std::int64_t n = part.width - c < kLanes<Real> ? part.width - c : kLanes<Real>;
      store_first(pivot + c, load_first(x + part.first + c, n), n);
    }
  }
  static void moments(const Part& part, const T* x, const Real* pivot, Real* mean, Real* m2) {
    part.layout == Layout::kChannelsFirst ? channel_moments(part, x, pivot, mean, m2)
                                          : stripe_moments(part, x, pivot, mean, m2);
  }
  static void sums(const Part& part, const T* dy, const T* x, const Centres<Real>& centres, double* g, double* gx) {
    part.layout == Layout::kChannelsFirst ? channel_sums(part, dy, x, centres, g, gx)
                                          : stripe_sums(part, dy, x, centres, g, gx);
  }
  static void normalise(const Part& part, const T* x, const Affines<Real>& a, T* y) {
    part.layout == Layout::kChannelsFirst ? channel_normalise(part, x, a, y) : stripe_normalise(part, x, a, y);
  }
  static void project(const Part& part, const T* dy, const T* x, const Centres<Real>& centres,
                      const Projections<Real>& p, T* dx) {
    part.layout == Layout::kChannelsFirst ? channel_project(part, dy, x, centres, p, dx)
                                          : stripe_project(part, dy, x, centres, p, dx);
  }

  static constexpr Sweeps<T> sweeps() { return {pivots, moments, sums, normalise, project}; }
};

constexpr Isa table(const char* name) {
  return {name, Entry<float>::sweeps(), Entry<double>::sweeps(), Entry<Half>::sweeps(), Entry<BFloat16>::sweeps()};
}

}  // namespace
}  // namespace brn::cpu
