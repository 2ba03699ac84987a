// How a tensor is cut for the CPU, and the order in which the pieces of a pass are done.
//
// A slab is neighbouring channels that are reduced together: in kChannelsFirst one, or a few small
// ones; in kChannelsLast mostly all. Its positions (elements of a channel, or rows of the [N*S][C]
// matrix) are cut into parts. How many is a function of the problem alone (several channels in
// kChannelsFirst are one part, however many the caches have room for), and parts are merged in
// their order, so that neither the number of threads nor the machine's caches change a bit of the
// result.
#pragma once

#include "../core/types.h"
#include "cache.h"
#include "element.h"
#include "isa.h"
#include "launch.h"
#include "traits.h"

#include <algorithm>
#include <cstdint>
#include <memory>

namespace brn::cpu {

// One tensor's share of a part: enough to make up for its merge.
constexpr std::int64_t kPartBytes = 256 * 1024;
constexpr std::int64_t kMostParts = 64;

// Measured, here and in the other files, on two cores of an AMD EPYC with AVX-512, 1 MB of L2 a
// core and 32 MB of L3; where it says Zen 3 or AVX2, on two of an older one, 512 KB of L2 a core;
// where it says Zen 5, on two of a newer one, caches as the first but 48 KB of L1; where it says
// Emerald Rapids, on two of an Intel Xeon with AVX-512, 2 MB of L2 a core.

// Below, a second thread costs more than it saves. On 25,088 float32, one thread and two: forward
// and backward 59 us and 41; on Zen 3 in channels_last, (1, 512, 7, 7), forward 31 and 22, backward
// 48 and 31.
constexpr std::int64_t kSerialElements = 16 * 1024;

// [0, total) in `count` shares of as many whole units as the others, or one more; the last unit may
// not be whole. Threads take as many shares each, so these must be even: backward of (4, 2048, 7,
// 7) float32 in channels_last, two threads, Zen 3, takes 398 us with 128 and 68 of the 196 rows,
// and 336 with 96 and 100.
struct Shares {
  std::int64_t total = 0;
  std::int64_t count = 0;
  std::int64_t unit = 1;
  std::int64_t least = 0;      // units of each share
  std::int64_t remainder = 0;  // units beyond those, spread over the shares

  static Shares of(std::int64_t total, std::int64_t count, std::int64_t unit = 1) {
    const std::int64_t units = ceil_div(total, unit);
    return {total, count, unit, units / count, units % count};
  }
  std::int64_t begin(std::int64_t k) const {
    // Without a division, which takes as long as a short run, where it is not needed.
    const std::int64_t more = remainder != 0 ? k * remainder / count : 0;
    return std::min((k * least + more) * unit, total);
  }
  std::int64_t largest() const { return std::min((least + (remainder != 0)) * unit, total); }
};

struct Slabs {
  Problem problem;
  Shares channels;            // a slab each
  Shares positions;           // of a slab: a part each
  std::int64_t streamed = 0;  // bytes of a tensor above which it is written past the caches

  std::int64_t count() const { return channels.count; }
  std::int64_t parts() const { return positions.count; }
  std::int64_t widest() const { return channels.largest(); }

  // Elements from a slab to the next, or 0 if that is not fetched ahead, or the caches have no room
  // for much of both.
  std::int64_t to_next(std::int64_t slab) const {
    constexpr std::int64_t kMostBytes = 512 * 1024;
    const Problem& p = problem;
    if (p.layout == Layout::kChannelsLast || slab + 1 >= count()) return 0;
    if (!traits().next_slab) return 0;
    const std::int64_t width = channels.begin(slab + 1) - channels.begin(slab);
    return width * p.reduced() * size_of(p.dtype) <= kMostBytes ? width * p.spatial : 0;
  }

  // Whether it pays to write a part past the caches. The lines at both ends of a stretch (see
  // streams.h) go through them, and those between have to make up for it. Planes that are stretches
  // each, forward and backward, float32, Emerald Rapids: (2048, 64, 49), of three lines, 1.20 and
  // 1.23 times as fast, (1024, 64, 97), of six, 1.28 and 1.20.
  bool has_long_stretches(const Part& part) const {
    constexpr std::int64_t kLine = 64;
    const std::int64_t plane = part.plane * size_of(problem.dtype);
    return part.layout == Layout::kChannelsLast || plane % kLine == 0 ||
           (plane >= kLine && part.width * plane >= 3 * kLine);
  }

  Part part(std::int64_t slab, std::int64_t j) const {
    const Problem& p = problem;
    const bool first = p.layout == Layout::kChannelsFirst;
    Part part;
    part.layout = p.layout;
    part.channel = channels.begin(slab);
    part.width = channels.begin(slab + 1) - part.channel;
    part.first = first ? part.channel * p.spatial : part.channel;
    part.plane = p.spatial;
    part.stride = first ? p.channels * p.spatial : p.channels;
    part.begin = positions.begin(j);
    part.end = positions.begin(j + 1);
    // Here, since a division takes as long as a short run.
    const std::int64_t planes = first ? part.begin / p.spatial : 0;
    part.within = first ? part.begin - planes * p.spatial : 0;
    part.offset = planes * part.stride + part.within;
    part.next = 0;
    part.ahead = (first ? traits().ahead : traits().ahead_of_rows) / size_of(p.dtype);
    part.many_planes = traits().many_planes;
    part.in_order = false;
    part.streamed = p.elements() * size_of(p.dtype) > streamed && has_long_stretches(part);
    part.to_l1 = first ? traits().to_l1 : traits().rows_to_l1;
    part.fetch_written = traits().fetch_written;
    part.eight_together = traits().eight_together;
    return part;
  }
};

// A share for each of four threads, if it makes up for what a share costs.
inline std::int64_t quarter_of(std::int64_t bytes) {
  return std::max<std::int64_t>(bytes / 4, 16 * 1024);
}

// As many as four threads can share evenly, or a few more than `count`.
inline std::int64_t in_fours(std::int64_t count) {
  return count > 2 ? ceil_div(count, 4) * 4 : count;
}

// Slabs of kChannelsFirst, no wider than `width`.
inline Shares even_channels(const Problem& p, std::int64_t width) {
  return Shares::of(p.channels, std::min(in_fours(ceil_div(p.channels, width)), p.channels));
}

// `inputs`: tensors that are read.
inline std::int64_t slab_width(const Problem& p, int inputs) {
  const std::int64_t channel = size_of(p.dtype) * std::max<std::int64_t>(p.reduced(), 1);
  if (p.layout == Layout::kChannelsFirst) {
    // Small channels together, to make up for what a slab costs, but four slabs for four threads.
    // All they read is a quarter of the L2, or an eighth where the next slab is fetched meanwhile
    // (see to_next()). Forward, one thread, float32, 1 MB of L2, against an eighth: (1, 512, 28,
    // 28) 1.07 and (4, 1024, 14, 14) 1.06 times as fast; half of it: 0.5 and 0.7. 512 KB of L2,
    // against twice as much, the mean of seven shapes each and both of float32 and bfloat16:
    // forward 1.01 and 1.02, backward 1.05 and 1.06. Plane by plane it is half of the L2, but no
    // more than a part, so that the planes of a slab are long pieces of memory: (32, 256, 14, 14)
    // forward and backward, against a quarter, 1.08 and 1.45; three quarters, forward, 0.98, and of
    // (32, 2048, 7, 7) 0.68.
    const std::int64_t bytes = channel * p.channels;
    const bool many = p.batch >= kManyPlanes;
    const bool by_plane = many && p.spatial * size_of(p.dtype) <= isa().short_plane_bytes;
    const std::int64_t share = by_plane ? 2 : many && traits().next_slab ? 8 : 4;
    const std::int64_t most = std::min(l2_bytes() / share / inputs, kPartBytes);  // one part
    const std::int64_t small = std::min(quarter_of(bytes), most);
    return std::clamp<std::int64_t>(small / channel, 1, std::max<std::int64_t>(p.channels, 1));
  }
  // Whole rows: pieces of rows that are a power of two apart meet in a few sets of the caches (64
  // bytes of 6,272 rows of 1,024 floats: 21 ms forward; whole rows: 3.5 ms). But a matrix with too
  // few rows to share out is cut into columns, four times if that leaves a kilobyte of each row,
  // and a page at the most.
  constexpr std::int64_t kPage = 4096;
  constexpr std::int64_t kFewRows = 128;
  if (p.reduced() > kFewRows) return p.channels;
  const std::int64_t row = p.channels * size_of(p.dtype);
  const std::int64_t quarter = ceil_div(row, 4 * 64) * 64;
  return std::min(p.channels, std::clamp(quarter, kPage / 4, kPage) / size_of(p.dtype));
}

inline Slabs cut(const Problem& p, int inputs) {
  const bool first = p.layout == Layout::kChannelsFirst;
  Slabs slabs;
  slabs.problem = p;
  slabs.streamed = inputs > 1 ? traits().streamed_backward : traits().streamed_forward;
  if (p.elements() == 0) return slabs;
  const std::int64_t width = slab_width(p, inputs);
  // In kChannelsLast of whole lines, and the nearest count: a little more than a page is no slab.
  slabs.channels =
      first ? even_channels(p, width)
            : Shares::of(p.channels, std::max<std::int64_t>((p.channels + width / 2) / width, 1),
                         64 / size_of(p.dtype));
  const std::int64_t bytes = width * p.reduced() * size_of(p.dtype);
  std::int64_t parts = std::clamp<std::int64_t>(ceil_div(bytes, kPartBytes), 1, kMostParts);
  // Where slabs are few, their parts in fours, to be shared out evenly, if it is worth two
  // meetings. Zen 3, two threads, in one part and in four: (4, 512, 7, 7) bfloat16 in
  // channels_last, forward 62 us and 45, backward 77 and 60; (16, 3, 64, 64) bfloat16, 56 and 53,
  // 83 and 80.
  if (slabs.count() < 4 && bytes >= kPartBytes / 2) parts = ceil_div(parts, 4) * 4;
  // Parts are made of whole lines or tiles.
  const std::int64_t whole = first ? 64 : 8;
  slabs.positions = Shares::of(p.reduced(), std::min(parts, ceil_div(p.reduced(), whole)), whole);
  return slabs;
}

// For a pass that reduces nothing: parts as they lie in memory, and in fours already where a
// reduction would not be worth sharing out. Inference on two threads, Zen 3: (1, 128, 28, 28)
// float32, 35 us in one part and 26 in four; (4, 512, 7, 7) bfloat16 in channels_last, 33 and 23.
inline Slabs cut_in_order(const Problem& p) {
  if (p.elements() == 0) return cut(p, 1);
  const std::int64_t bytes = p.elements() * size_of(p.dtype);
  const std::int64_t part = std::min(quarter_of(bytes), kPartBytes);
  if (p.layout == Layout::kChannelsLast) {
    Slabs slabs = cut(p, 1);
    slabs.streamed = traits().streamed_in_order;
    const std::int64_t units = ceil_div(p.reduced(), slabs.positions.unit);
    const std::int64_t parts = std::min(in_fours(ceil_div(bytes, part)), units);
    if (slabs.count() == 1) slabs.positions = Shares::of(p.reduced(), parts, slabs.positions.unit);
    return slabs;
  }
  const std::int64_t plane = p.spatial * size_of(p.dtype);
  Slabs slabs;
  slabs.problem = p;
  slabs.streamed = traits().streamed_in_order;
  slabs.channels = even_channels(p, std::clamp<std::int64_t>(part / plane, 1, p.channels));
  slabs.positions = Shares::of(p.reduced(), p.batch, p.spatial);
  return slabs;
}

// Calls f(begin, end) for stretches of [0, count), one a thread.
template <typename F>
void for_stretches(const Problem& p, const Parallel& parallel, std::int64_t count, const F& f) {
  if (parallel.run == nullptr || parallel.threads <= 1 || count <= 1 ||
      p.elements() < kSerialElements) {
    return f(std::int64_t{0}, count);
  }
  const auto body = [](std::int64_t begin, std::int64_t end, void* context) {
    (*static_cast<const F*>(context))(begin, end);
  };
  parallel.run(0, count, ceil_div(count, parallel.threads), body, const_cast<F*>(&f));
}

// Rows of values, one a channel of a slab.
template <typename Real>
struct Table {
  Real* values;
  std::int64_t stride;

  Real* operator[](int row) const { return values + row * stride; }
};

// The tables of `slabs` slabs that are in work: one of facts and `parts` of partial results each.
template <typename Pass>
class Tables {
 public:
  using Real = typename Pass::Real;

  Tables(std::int64_t slabs, std::int64_t parts, std::int64_t width)
      : parts_(parts), stride_((ceil_div(width, 2 * kLine) * 2 + 1) * kLine) {
    const std::int64_t values = slabs * rows() * stride_;
    if (values > kFew) many_.reset(new Real[static_cast<std::size_t>(values)]);
    values_ = many_ != nullptr ? many_.get() : few_;
  }
  Tables(const Tables&) = delete;
  Tables& operator=(const Tables&) = delete;

  Table<Real> facts(std::int64_t slab) const {
    return {&values_[slab * rows() * stride_], stride_};
  }
  Table<Real> partials(std::int64_t slab, std::int64_t part) const {
    return {&values_[(slab * rows() + Pass::kFacts + part * Pass::kPartials) * stride_], stride_};
  }

 private:
  // Rows have room for whole vectors of 16-bit elements, and a line more, or rows a power of two
  // apart would meet in one set of the L1.
  static constexpr std::int64_t kLine = 64 / sizeof(Real);

  // On the stack as far as it goes: an allocation of a kilobyte or more makes glibc merge what
  // others have freed. 5,600 instructions, where all the rest of a forward of (1, 2, 2, 2) below
  // the binding takes 2,400.
  static constexpr std::int64_t kFew = 32 * 1024 / sizeof(Real);

  std::int64_t rows() const { return Pass::kFacts + parts_ * Pass::kPartials; }

  std::int64_t parts_;
  std::int64_t stride_;
  Real* values_ = nullptr;
  std::unique_ptr<Real[]> many_;
  Real few_[kFew];
};

template <typename Pass>
void run_slab_by_slab(const Slabs& slabs, const Parallel& parallel, const Pass& pass) {
  for_stretches(slabs.problem, parallel, slabs.count(), [&](std::int64_t begin, std::int64_t end) {
    const Tables<Pass> tables(1, 2, slabs.widest());
    const auto facts = tables.facts(0);
    const auto total = tables.partials(0, 0);
    const auto partial = tables.partials(0, 1);
    for (std::int64_t i = begin; i < end; ++i) {
      const Part slab = slabs.part(i, 0);
      pass.begin(slab, facts);
      pass.reduce(slab, facts, total);
      for (std::int64_t j = 1; j < slabs.parts(); ++j) {
        pass.reduce(slabs.part(i, j), facts, partial);
        pass.merge(slabs.part(i, j), partial, total);
      }
      pass.finish(slab, total, facts);
      const std::int64_t next = i + 1 < end ? slabs.to_next(i) : 0;
      for (std::int64_t j = slabs.parts(); j-- > 0;) {
        Part part = slabs.part(i, j);
        part.next = next;
        pass.write(part, facts);
      }
    }
  });
}

template <typename Pass>
void run_together(const Slabs& slabs, const Parallel& parallel, const Pass& pass) {
  const std::int64_t parts = slabs.parts();
  const Tables<Pass> tables(slabs.count(), parts, slabs.widest());
  const auto reduce = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) {
      const std::int64_t i = k / parts;
      const std::int64_t j = k % parts;
      pass.reduce(slabs.part(i, j), tables.facts(i), tables.partials(i, j));
    }
  };
  const auto write = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = end; k-- > begin;) {
      const std::int64_t i = k / parts;
      pass.write(slabs.part(i, k % parts), tables.facts(i));
    }
  };

  for (std::int64_t i = 0; i < slabs.count(); ++i) pass.begin(slabs.part(i, 0), tables.facts(i));
  for_stretches(slabs.problem, parallel, slabs.count() * parts, reduce);
  for (std::int64_t i = 0; i < slabs.count(); ++i) {
    const Table<typename Pass::Real> total = tables.partials(i, 0);
    for (std::int64_t j = 1; j < slabs.parts(); ++j) {
      pass.merge(slabs.part(i, j), tables.partials(i, j), total);
    }
    pass.finish(slabs.part(i, 0), total, tables.facts(i));
  }
  for_stretches(slabs.problem, parallel, slabs.count() * parts, write);
}

// A pass has begin (a slab: what reduce has to know), reduce (a part), merge (a part into those
// before it), finish (a slab) and write (a part, the last one read first). Either a thread does one
// slab after the other, each of which may still be in its cache when it is written; or, where that
// would leave a fifth of the threads' time idle, all threads share all slabs and meet between
// reduce and write.
template <typename Pass>
void run(const Slabs& slabs, const Parallel& parallel, const Pass& pass) {
  const std::int64_t threads = std::max(parallel.threads, 1);
  const bool even = 4 * ceil_div(slabs.count(), threads) * threads <= 5 * slabs.count();
  if (threads == 1 || slabs.parts() == 1 || even) {
    run_slab_by_slab(slabs, parallel, pass);
  } else {
    run_together(slabs, parallel, pass);
  }
}

}  // namespace brn::cpu
