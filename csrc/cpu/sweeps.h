// The sweeps over a part of a slab, written once for every instruction set, layout and element
// type.
//
// kChannelsFirst: the vectors of a run (what a part has of one plane) belong to one channel; lanes
// are added up at the end of a tile of runs, which is read twice, for its mean and then, from the
// L1, for m2.
// kChannelsLast: each lane is a channel; a tile is kRows rows, in registers between its mean and
// its m2.
//
// Nothing with a scalar signature in another header is called from here: the linker could take this
// copy of an inline function, with this file's instructions, for every processor.
#pragma once

#include "../core/math.h"
#include "isa.h"
#include "lanes.h"

#include <type_traits>

namespace brn::cpu {
namespace {

// merge() of math.h where the lanes of mean and m2 have one count between them.
template <typename Real, typename Value>
struct SharedMoments {
  Real count;
  Value mean;
  Value m2;
};
template <typename Real, typename Value>
BRN_LANES SharedMoments<Real, Value> merge(SharedMoments<Real, Value> a,
                                           SharedMoments<Real, Value> b) {
  const Real count = a.count + b.count;
  const Real weight = b.count / count;
  const Value delta = b.mean - a.mean;
  return {count, a.mean + delta * weight, a.m2 + b.m2 + delta * delta * (a.count * weight)};
}

template <typename T>
struct Centre {
  Lanes<T> pivot;
  Lanes<T> offset;

  BRN_LANES Lanes<T> operator()(Lanes<T> x) const { return (x - pivot) - offset; }
};

template <typename T>
struct LaneSums {
  Lanes<T> g;
  Lanes<T> gx;

  BRN_LANES LaneSums& operator+=(LaneSums b) {
    g += b.g;
    gx += b.gx;
    return *this;
  }
};

// A sum and the rounding errors it has made (Knuth's two-sum): as good as one in twice the
// precision.
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

template <typename Value>
BRN_LANES Value sum_of_eight(const Value (&v)[8]) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

// The sums of eight vectors of each, `stride` elements apart.
template <typename T>
BRN_LANES LaneSums<T> tile_sums(const T* dy, const T* x, std::int64_t stride,
                                const Centre<T>& centre) {
  Lanes<T> g[8];
  Lanes<T> gx[8];
  for (int k = 0; k < 8; ++k) {
    g[k] = load(dy + k * stride);
    gx[k] = g[k] * centre(load(x + k * stride));
  }
  return {sum_of_eight(g), sum_of_eight(gx)};
}

// ---- kChannelsFirst

// Calls f(element, length) for the runs of the slab's w-th channel at the positions [begin, end).
template <typename F>
BRN_LANES void for_each_run(const Part& part, std::int64_t w, std::int64_t begin, std::int64_t end,
                            F f) {
  std::int64_t s = begin < part.plane ? begin : begin % part.plane;
  std::int64_t plane =
      part.first + w * part.plane + (begin < part.plane ? 0 : begin / part.plane) * part.stride;
  for (std::int64_t left = end - begin; left > 0; plane += part.stride, s = 0) {
    const std::int64_t length = part.plane - s < left ? part.plane - s : left;
    f(plane + s, length);
    left -= length;
  }
}

// Fetches what the next channel has of a plane, where planes are too short for the prefetchers to
// follow. (32, 2048, 7, 7), one thread, without and with: forward 2.4 and 1.9 ms, backward 4.4
// and 3.2 ms.
template <bool kToWrite = false, typename T>
BRN_LANES void fetch_next(const Part& part, const T* plane) {
  constexpr std::int64_t kShort = 2048 / sizeof(T);
  constexpr std::int64_t kLine = 64 / sizeof(T);
  if (part.cached || part.plane > kShort) return;
  for (std::int64_t i = 0; i < part.plane; i += kLine)
    __builtin_prefetch(plane + part.plane + i, kToWrite);
}

// Positions that are read twice for their moments: 16 KB, half of an L1.
template <typename T>
constexpr std::int64_t kTile = 16384 / sizeof(T);

// The sum of f(lanes of x) over a run.
template <typename T, typename F>
BRN_LANES Lanes<T> sum_over_run(const T* x, std::int64_t length, F f) {
  constexpr int kStep = kLanes<T>;
  Lanes<T> sums[4] = {};
  std::int64_t i = 0;
  for (; i + 4 * kStep <= length; i += 4 * kStep) {
    for (int k = 0; k < 4; ++k) sums[k] += f(load(x + i + k * kStep));
  }
  for (; i + kStep <= length; i += kStep) sums[0] += f(load(x + i));
  if (i < length) {
    sums[1] += length >= kStep ? last_elements<T>(length - i)(f(load(x + length - kStep)))
                               : first_elements<T>(length - i)(f(load_first(x, length)));
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <typename T>
BRN_LANES SharedMoments<RealOf<T>, RealOf<T>> channel_moments(const Part& part, std::int64_t w,
                                                              const T* x, RealOf<T> pivot) {
  using Real = RealOf<T>;
  const Lanes<T> pivots = Lanes<T>::of(pivot);
  SharedMoments<Real, Real> moments{0, 0, 0};
  for (std::int64_t begin = part.begin; begin < part.end; begin += kTile<T>) {
    const std::int64_t end = begin + kTile<T> < part.end ? begin + kTile<T> : part.end;
    const Real count = static_cast<Real>(end - begin);
    Lanes<T> sum{};
    for_each_run(part, w, begin, end, [&](std::int64_t at, std::int64_t length) BRN_INLINED {
      fetch_next(part, x + at);
      sum += sum_over_run(x + at, length, [&](Lanes<T> v) BRN_INLINED { return v - pivots; });
    });
    const Real mean = sum_across(sum) / count;
    const Lanes<T> means = Lanes<T>::of(mean);
    Lanes<T> m2{};
    for_each_run(part, w, begin, end, [&](std::int64_t at, std::int64_t length) BRN_INLINED {
      m2 += sum_over_run(x + at, length, [&](Lanes<T> v) BRN_INLINED {
        const Lanes<T> deviation = (v - pivots) - means;
        return deviation * deviation;
      });
    });
    const SharedMoments<Real, Real> tile{count, mean, sum_across(m2)};
    moments = begin == part.begin ? tile : merge(moments, tile);
  }
  return moments;
}

// A running sum in blocks of at least eight vectors, so that few additions stand between an element
// and the exact total.
template <typename T>
struct ChannelSums {
  const Centre<T>& centre;
  ExactSum<Lanes<T>> g{};
  ExactSum<Lanes<T>> gx{};
  LaneSums<T> open{};
  int vectors = 0;  // in open

  BRN_LANES void close(LaneSums<T> sums) {
    g.add(sums.g);
    gx.add(sums.gx);
  }
  BRN_LANES void add_run(const T* dy, const T* x, std::int64_t length) {
    constexpr int kStep = kLanes<T>;
    std::int64_t i = 0;
    for (; i + 8 * kStep <= length; i += 8 * kStep) close(tile_sums(dy + i, x + i, kStep, centre));
    for (; i + kStep <= length; i += kStep, ++vectors) add(load(dy + i), centre(load(x + i)));
    if (i < length) {
      if (length >= kStep) {
        const Mask<T> mask = last_elements<T>(length - i);
        add(mask(load(dy + length - kStep)), mask(centre(load(x + length - kStep))));
      } else {
        const Mask<T> mask = first_elements<T>(length);
        add(load_first(dy, length), mask(centre(load_first(x, length))));
      }
      ++vectors;
    }
    if (vectors >= 8) {
      close(open);
      open = {};
      vectors = 0;
    }
  }
  BRN_LANES void add(Lanes<T> v, Lanes<T> x_minus_mean) { open += {v, v * x_minus_mean}; }
};

// Sum and error of all lanes together.
template <typename T>
BRN_LANES ExactSum<RealOf<T>> across(const ExactSum<Lanes<T>>& lanes) {
  using Real = RealOf<T>;
  using Some = typename VectorOf<Real, BRN_VECTOR_BYTES* static_cast<int>(sizeof(Real)) /
                                           8>::Type;  // as many as doubles
  Vector<double> total{};
  for (int i = 0; i < Lanes<T>::kVectors; ++i) {
    const Vector<Real> error = lanes.error.v[i] == lanes.error.v[i]
                                   ? lanes.error.v[i]
                                   : Vector<Real>{};  // an inf's is NaN
    Some sums[8 / sizeof(Real)];
    Some errors[8 / sizeof(Real)];
    std::memcpy(sums, &lanes.sum.v[i], sizeof(sums));
    std::memcpy(errors, &error, sizeof(errors));
    for (std::size_t k = 0; k < 8 / sizeof(Real); ++k) {
      total += __builtin_convertvector(sums[k], Vector<double>) +
               __builtin_convertvector(errors[k], Vector<double>);
    }
  }
  const double sum = sum_across<double, BRN_VECTOR_BYTES>(total);
  return {static_cast<Real>(sum),
          static_cast<Real>(sum - static_cast<double>(static_cast<Real>(sum)))};
}

template <typename T>
BRN_LANES void channel_sums(const Part& part, std::int64_t w, const T* dy, const T* x,
                            const Centres<RealOf<T>>& centres, const SumRows<RealOf<T>>& rows) {
  using Real = RealOf<T>;
  const Centre<T> centre{Lanes<T>::of(centres.pivot[w]), Lanes<T>::of(centres.offset[w])};
  ChannelSums<T> sums{centre};
  for_each_run(part, w, part.begin, part.end,
               [&](std::int64_t at, std::int64_t length) BRN_INLINED {
                 fetch_next(part, dy + at);
                 fetch_next(part, x + at);
                 sums.add_run(dy + at, x + at, length);
               });
  if (sums.vectors > 0) sums.close(sums.open);
  const ExactSum<Real> g = across(sums.g);
  const ExactSum<Real> gx = across(sums.gx);
  rows.g[w] = g.sum;
  rows.g_error[w] = g.error;
  rows.gx[w] = gx.sum;
  rows.gx_error[w] = gx.error;
}

// Calls whole(i) for vectors that cover a run, the last of them over part of the one before it; a
// run shorter than a vector is left to rest(length).
template <typename T, typename F, typename Rest>
BRN_LANES void cover(std::int64_t length, F whole, Rest rest) {
  constexpr int kStep = kLanes<T>;
  std::int64_t i = 0;
  for (; i + 4 * kStep <= length; i += 4 * kStep) {
    for (int k = 0; k < 4; ++k) whole(i + k * kStep);
  }
  for (; i + kStep <= length; i += kStep) whole(i);
  if (i == length) return;
  if (length >= kStep) {
    whole(length - kStep);
  } else {
    rest(length);
  }
}

template <typename T>
BRN_LANES void channel_normalise(const Part& part, std::int64_t w, const T* x,
                                 const Affines<RealOf<T>>& a, T* y) {
  const Affine<Lanes<T>> affine{Lanes<T>::of(a.pivot[w]), Lanes<T>::of(a.offset[w]),
                                Lanes<T>::of(a.scale[w]), Lanes<T>::of(a.shift[w])};
  for_each_run(
      part, w, part.begin, part.end, [&](std::int64_t at, std::int64_t length) BRN_INLINED {
        fetch_next<true>(part, y + at);
        cover<T>(
            length,
            [&](std::int64_t i) BRN_INLINED { store(y + at + i, apply(affine, load(x + at + i))); },
            [&](std::int64_t n) { store_first(y + at, apply(affine, load_first(x + at, n)), n); });
      });
}

template <typename T>
BRN_LANES void channel_project(const Part& part, std::int64_t w, const T* dy, const T* x,
                               const Centres<RealOf<T>>& centres, const Projections<RealOf<T>>& p,
                               T* dx) {
  const Centre<T> centre{Lanes<T>::of(centres.pivot[w]), Lanes<T>::of(centres.offset[w])};
  const Projection<Lanes<T>> projection{Lanes<T>::of(p.mean_g[w]), Lanes<T>::of(p.slope[w]),
                                        Lanes<T>::of(p.scale[w])};
  for_each_run(
      part, w, part.begin, part.end, [&](std::int64_t at, std::int64_t length) BRN_INLINED {
        fetch_next<true>(part, dx + at);
        cover<T>(
            length,
            [&](std::int64_t i) BRN_INLINED {
              store(dx + at + i, apply(projection, load(dy + at + i), centre(load(x + at + i))));
            },
            [&](std::int64_t n) {
              store_first(dx + at,
                          apply(projection, load_first(dy + at, n), centre(load_first(x + at, n))),
                          n);
            });
      });
}

// ---- kChannelsLast

struct Rows {
  std::int64_t first;
  std::int64_t count;
  std::int64_t stride;
  std::int64_t width;
  bool cached;
};

BRN_LANES Rows rows_of(const Part& part) {
  return {part.first + part.begin * part.stride, part.end - part.begin, part.stride, part.width,
          part.cached};
}

constexpr int kRows = 8;  // of a tile

// Calls f(column, end) for stretches of whole vectors. Where the width is no multiple of a vector,
// the last one is a stretch of its own over columns that were done before, with the same result.
template <typename T, typename F>
BRN_LANES void for_each_stretch(const Rows& rows, F f) {
  // Rows from the cache by 2 KB of parameters, which stay in the L1; from memory in whole, for the
  // prefetchers.
  const std::int64_t columns = rows.cached ? 2048 / sizeof(RealOf<T>) : rows.width;
  const std::int64_t whole = rows.width / kLanes<T> * kLanes<T>;
  for (std::int64_t c = 0; c < whole; c += columns) f(c, c + columns < whole ? c + columns : whole);
  if (whole < rows.width) f(rows.width - kLanes<T>, rows.width);
}

// Reads the lines of a tile in their order, a page of each tensor at a time. The tile's own order,
// eight rows at once, is not one that the prefetchers follow unless rows are long: GB/s of x out of
// memory without and with this, for C = 64 and 256: moments 20 and 33, 11 and 26; sums 6.8
// and 17.9, 6.5 and 9.9; C = 1024: moments 23, sums 12.5 without.
template <typename T, typename... Others>
BRN_LANES void touch(const Rows& rows, std::int64_t height, const T* tile,
                     const Others*... others) {
  constexpr std::int64_t kPage = 4096 / sizeof(T);
  constexpr std::int64_t kLine = 64 / sizeof(T);
  if (rows.cached || rows.width != rows.stride || rows.stride > kPage / 2) return;
  const std::int64_t size = height * rows.stride;
  for (std::int64_t page = 0; page < size; page += kPage) {
    const auto read = [&](const T* from) BRN_INLINED {
      const T* end = from + (page + kPage < size ? page + kPage : size);
      for (from += page; from < end; from += kLine) {
        static_cast<void>(*reinterpret_cast<const volatile std::uint16_t*>(from));
      }
    };
    read(tile);
    (read(others), ...);
  }
}

template <typename T>
using LaneMoments = SharedMoments<RealOf<T>, Lanes<T>>;

template <typename T>
BRN_LANES LaneMoments<T> tile_moments(const T* x, std::int64_t stride, Lanes<T> pivot) {
  Lanes<T> u[kRows];
  for (int k = 0; k < kRows; ++k) u[k] = load(x + k * stride) - pivot;
  const Lanes<T> mean = sum_of_eight(u) * (RealOf<T>(1) / kRows);
  for (int k = 0; k < kRows; ++k) u[k] = (u[k] - mean) * (u[k] - mean);
  return {kRows, mean, sum_of_eight(u)};
}

// The same of fewer rows.
template <typename T>
BRN_LANES LaneMoments<T> tile_moments(const T* x, std::int64_t stride, Lanes<T> pivot,
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

template <typename T>
void wide_moments(const Rows& rows, const T* x, const RealOf<T>* pivot, RealOf<T>* mean,
                  RealOf<T>* m2) {
  for_each_stretch<T>(rows, [&](std::int64_t column, std::int64_t end) BRN_INLINED {
    for (std::int64_t row = 0; row < rows.count; row += kRows) {
      const T* tile = x + rows.first + row * rows.stride;
      const std::int64_t height = rows.count - row < kRows ? rows.count - row : kRows;
      touch(rows, height, tile);
      for (std::int64_t c = column; c < end; c += kLanes<T>) {
        const Lanes<T> pivots = load_reals<T>(pivot + c);
        LaneMoments<T> moments = height == kRows
                                     ? tile_moments(tile + c, rows.stride, pivots)
                                     : tile_moments(tile + c, rows.stride, pivots, height);
        if (row > 0) {
          moments =
              merge({static_cast<RealOf<T>>(row), load_reals<T>(mean + c), load_reals<T>(m2 + c)},
                    moments);
        }
        store_reals<T>(mean + c, moments.mean);
        store_reals<T>(m2 + c, moments.m2);
      }
    }
  });
}

template <typename T>
void wide_sums(const Rows& rows, const T* dy, const T* x, const Centres<RealOf<T>>& centres,
               const SumRows<RealOf<T>>& out) {
  for_each_stretch<T>(rows, [&](std::int64_t column, std::int64_t end) BRN_INLINED {
    for (std::int64_t row = 0; row < rows.count; row += kRows) {
      const std::int64_t tile = rows.first + row * rows.stride;
      const std::int64_t height = rows.count - row < kRows ? rows.count - row : kRows;
      touch(rows, height, dy + tile, x + tile);
      for (std::int64_t c = column; c < end; c += kLanes<T>) {
        const Centre<T> centre{load_reals<T>(centres.pivot + c), load_reals<T>(centres.offset + c)};
        LaneSums<T> sums{};
        if (height == kRows) {
          sums = tile_sums(dy + tile + c, x + tile + c, rows.stride, centre);
        } else {
          for (std::int64_t k = tile + c; k < tile + c + height * rows.stride; k += rows.stride) {
            const Lanes<T> g = load(dy + k);
            sums += {g, g * centre(load(x + k))};
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
template <typename T, int kTogether, typename F>
BRN_LANES void for_each_vector_of(const Rows& rows, F f) {
  for_each_stretch<T>(rows, [&](std::int64_t column, std::int64_t end) BRN_INLINED {
    for (std::int64_t row = 0; row < rows.count; row += kTogether) {
      const std::int64_t at = rows.first + row * rows.stride;
      const std::int64_t height = rows.count - row;
      if (height >= kTogether) {
        for (std::int64_t c = column; c < end; c += kLanes<T>) f(at + c, kTogether, c);  // unrolled
      } else {
        for (std::int64_t c = column; c < end; c += kLanes<T>) f(at + c, height, c);
      }
    }
  });
}

template <typename T>
BRN_LANES Affine<Lanes<T>> load_affine(const Affines<RealOf<T>>& a, std::int64_t c) {
  return {load_reals<T>(a.pivot + c), load_reals<T>(a.offset + c), load_reals<T>(a.scale + c),
          load_reals<T>(a.shift + c)};
}

// From the cache, as many rows as find room in the sets of the L1, for which rows that are a power
// of two apart compete. From memory, one row: in order, for the prefetchers (GB/s of x for y, C =
// 256, by 1, 2, 4 rows: 12.5, 5.8, 5.3; C = 1024: 13.0, 9.2, 10.4), unless its parameters, kReals a
// channel, leave no room in the L1 (C = 2048: 7.7, 9.6, 10.8).
template <typename T, int kReals, typename F>
BRN_LANES void for_each_vector(const Rows& rows, F f) {
  constexpr std::int64_t kNear = 1024 / sizeof(T);
  constexpr std::int64_t kFit = 16384 / (kReals * sizeof(RealOf<T>));
  if (rows.cached) {
    rows.stride <= kNear ? for_each_vector_of<T, 8>(rows, f) : for_each_vector_of<T, 2>(rows, f);
  } else {
    rows.width <= kFit ? for_each_vector_of<T, 1>(rows, f) : for_each_vector_of<T, 4>(rows, f);
  }
}

template <typename T>
void wide_normalise(const Rows& rows, const T* x, const Affines<RealOf<T>>& a, T* y) {
  for_each_vector<T, 4>(rows,
                        [&](std::int64_t at, std::int64_t height, std::int64_t c) BRN_INLINED {
                          const Affine<Lanes<T>> affine = load_affine<T>(a, c);
                          for (std::int64_t k = 0; k < height; ++k, at += rows.stride)
                            store(y + at, apply(affine, load(x + at)));
                        });
}

template <typename T>
void wide_project(const Rows& rows, const T* dy, const T* x, const Centres<RealOf<T>>& centres,
                  const Projections<RealOf<T>>& p, T* dx) {
  for_each_vector<T, 5>(
      rows, [&](std::int64_t at, std::int64_t height, std::int64_t c) BRN_INLINED {
        const Centre<T> centre{load_reals<T>(centres.pivot + c), load_reals<T>(centres.offset + c)};
        const Projection<Lanes<T>> projection{
            load_reals<T>(p.mean_g + c), load_reals<T>(p.slope + c), load_reals<T>(p.scale + c)};
        for (std::int64_t k = 0; k < height; ++k, at += rows.stride) {
          store(dx + at, apply(projection, load(dy + at), centre(load(x + at))));
        }
      });
}

// Rows narrower than a vector: as many of them as fill whole vectors make one wide row. What is
// left over is less than a wide row; it is copied and filled up to one.
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
    wide = {rows.first, rows.count / fold, rows.stride * fold, rows.width * fold, rows.cached};
    rest = rows.count % fold * rows.width;
    rest_at = wide.first + wide.count * wide.stride;
  }
  BRN_LANES Rows rest_row() const { return {0, 1, wide.width, wide.width, true}; }

  // The parameters of a wide row.
  BRN_LANES const Real* widen(const Real* values, Real* repeated) const {
    for (std::int64_t k = 0; k < wide.width; ++k)
      repeated[k] = k < width ? values[k] : repeated[k - width];
    return repeated;
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
  narrow.widen(pivot, pivots);
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
void narrow_sums(const Rows& rows, const T* dy, const T* x, const Centres<RealOf<T>>& centres,
                 const SumRows<RealOf<T>>& out) {
  using Real = RealOf<T>;
  const Narrow<T> narrow(rows);
  Real repeated[2][Narrow<T>::kMost];
  Real sums[2][4][Narrow<T>::kMost];  // of the wide rows, of the rest
  T row[2][Narrow<T>::kMost];
  const Centres<Real> wide{narrow.widen(centres.pivot, repeated[0]),
                           narrow.widen(centres.offset, repeated[1])};
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
  RealOf<T> repeated[4][Narrow<T>::kMost];
  T row[2][Narrow<T>::kMost];
  const Affines<RealOf<T>> wide{
      narrow.widen(a.pivot, repeated[0]), narrow.widen(a.offset, repeated[1]),
      narrow.widen(a.scale, repeated[2]), narrow.widen(a.shift, repeated[3])};
  wide_normalise(narrow.wide, x, wide, y);
  if (narrow.rest == 0) return;
  wide_normalise(narrow.rest_row(), narrow.widen_rest(x, row[0]), wide, row[1]);
  std::memcpy(y + narrow.rest_at, row[1], static_cast<std::size_t>(narrow.rest) * sizeof(T));
}

template <typename T>
void narrow_project(const Rows& rows, const T* dy, const T* x, const Centres<RealOf<T>>& centres,
                    const Projections<RealOf<T>>& p, T* dx) {
  const Narrow<T> narrow(rows);
  RealOf<T> repeated[5][Narrow<T>::kMost];
  T row[3][Narrow<T>::kMost];
  const Centres<RealOf<T>> wide_centres{narrow.widen(centres.pivot, repeated[0]),
                                        narrow.widen(centres.offset, repeated[1])};
  const Projections<RealOf<T>> wide{narrow.widen(p.mean_g, repeated[2]),
                                    narrow.widen(p.slope, repeated[3]),
                                    narrow.widen(p.scale, repeated[4])};
  wide_project(narrow.wide, dy, x, wide_centres, wide, dx);
  if (narrow.rest == 0) return;
  wide_project(narrow.rest_row(), narrow.widen_rest(dy, row[0]), narrow.widen_rest(x, row[1]),
               wide_centres, wide, row[2]);
  std::memcpy(dx + narrow.rest_at, row[2], static_cast<std::size_t>(narrow.rest) * sizeof(T));
}

// ---- the table

template <typename T>
struct Entries {
  using Real = RealOf<T>;

  static bool is_narrow(const Part& part) { return part.width < kLanes<T>; }

  static void pivots(const Part& part, const T* x, Real* pivot) {
    if (part.layout == Layout::kChannelsFirst || is_narrow(part)) {
      const std::int64_t stride = part.layout == Layout::kChannelsFirst ? part.plane : 1;
      for (std::int64_t w = 0; w < part.width; ++w) pivot[w] = to_real(x[part.first + w * stride]);
    } else {
      for_each_stretch<T>(rows_of(part), [&](std::int64_t column, std::int64_t end) BRN_INLINED {
        for (std::int64_t c = column; c < end; c += kLanes<T>)
          store_reals<T>(pivot + c, load(x + part.first + c));
      });
    }
  }

  static void moments(const Part& part, const T* x, const Real* pivot, Real* mean, Real* m2) {
    if (part.layout == Layout::kChannelsFirst) {
      for (std::int64_t w = 0; w < part.width; ++w) {
        const SharedMoments<Real, Real> moments = channel_moments(part, w, x, pivot[w]);
        mean[w] = moments.mean;
        m2[w] = moments.m2;
      }
    } else {
      is_narrow(part) ? narrow_moments(rows_of(part), x, pivot, mean, m2)
                      : wide_moments(rows_of(part), x, pivot, mean, m2);
    }
  }

  static void sums(const Part& part, const T* dy, const T* x, const Centres<Real>& centres,
                   const SumRows<Real>& out) {
    if (part.layout == Layout::kChannelsFirst) {
      for (std::int64_t w = 0; w < part.width; ++w) channel_sums(part, w, dy, x, centres, out);
    } else {
      is_narrow(part) ? narrow_sums(rows_of(part), dy, x, centres, out)
                      : wide_sums(rows_of(part), dy, x, centres, out);
    }
  }

  static void normalise(const Part& part, const T* x, const Affines<Real>& a, T* y) {
    if (part.layout == Layout::kChannelsFirst) {
      for (std::int64_t w = 0; w < part.width; ++w) channel_normalise(part, w, x, a, y);
    } else {
      is_narrow(part) ? narrow_normalise(rows_of(part), x, a, y)
                      : wide_normalise(rows_of(part), x, a, y);
    }
  }

  static void project(const Part& part, const T* dy, const T* x, const Centres<Real>& centres,
                      const Projections<Real>& p, T* dx) {
    if (part.layout == Layout::kChannelsFirst) {
      for (std::int64_t w = 0; w < part.width; ++w) channel_project(part, w, dy, x, centres, p, dx);
    } else {
      is_narrow(part) ? narrow_project(rows_of(part), dy, x, centres, p, dx)
                      : wide_project(rows_of(part), dy, x, centres, p, dx);
    }
  }

  static constexpr Sweeps<T> sweeps() { return {pivots, moments, sums, normalise, project}; }
};

constexpr Isa table(const char* name) {
  return {name, Entries<float>::sweeps(), Entries<double>::sweeps(), Entries<Half>::sweeps(),
          Entries<BFloat16>::sweeps()};
}

}  // namespace
}  // namespace brn::cpu
