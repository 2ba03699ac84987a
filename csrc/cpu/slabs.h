// How a tensor is cut for the CPU, and the order in which the pieces of a pass are done.
//
// A slab is what is reduced together: one channel (kChannelsFirst) or a stripe of neighbouring channels (kChannelsLast). Its
// positions (elements of the channel, or rows of the [N*S][C] matrix) are cut into parts. The cut is a function of the problem
// alone and parts are merged in their order, so that the number of threads changes no bit of the result.
#pragma once

#include "../core/types.h"
#include "element.h"
#include "isa.h"
#include "launch.h"

#include <algorithm>
#include <cstdint>
#include <memory>

namespace brn::cpu {

// x of a slab, and dy going back, that is still in the L2 (1 MB a core) when the statistics are known.
constexpr std::int64_t kRetainedBytes = 512 * 1024;

// One tensor's share of a part: enough to make up for its merge, and some parts of the last ones read stay in the L2.
constexpr std::int64_t kPartBytes = 256 * 1024;
constexpr std::int64_t kMostParts = 64;

// Below, a second thread costs more than it saves.
constexpr std::int64_t kSerialElements = 64 * 1024;

struct Slabs {
  Problem problem;
  std::int64_t width = 1;  // channels of a slab; the last has the remainder, too
  std::int64_t count = 0;
  std::int64_t parts = 1;  // of a slab
  std::int64_t share = 0;  // positions of a part; the last may have fewer

  Part part(std::int64_t slab, std::int64_t j) const {
    const Problem& p = problem;
    const bool first = p.layout == Layout::kChannelsFirst;
    const std::int64_t channel = slab * width;
    return {p.layout,
            channel,
            slab + 1 < count ? width : p.channels - channel,
            first ? channel * p.spatial : channel,
            p.spatial,
            first ? p.channels * p.spatial : p.channels,
            j * share,
            std::min((j + 1) * share, p.reduced())};
  }
};

// `tensors` are read by the reduction: one going forward, two going back.
inline Slabs cut(const Problem& p, int tensors) {
  Slabs slabs;
  slabs.problem = p;
  const std::int64_t position = size_of(p.dtype) * std::max<std::int64_t>(p.reduced(), 1);
  if (p.layout == Layout::kChannelsLast) {
    constexpr std::int64_t kWidest = kMaxWidth / 2;
    const std::int64_t line = 64 / size_of(p.dtype);
    const std::int64_t retained = kRetainedBytes / (tensors * position) / line * line;
    slabs.width = std::min({retained > 0 ? retained : kWidest, kWidest, p.channels});
  }
  slabs.count = p.channels / std::max<std::int64_t>(slabs.width, 1);
  slabs.parts = std::clamp<std::int64_t>(ceil_div(position * slabs.width, kPartBytes), 1, kMostParts);
  constexpr std::int64_t kWhole = 64;  // positions, so that parts are made of whole lines and tiles
  slabs.share = ceil_div(ceil_div(p.reduced(), slabs.parts), kWhole) * kWhole;
  slabs.parts = std::max<std::int64_t>(ceil_div(p.reduced(), std::max<std::int64_t>(slabs.share, 1)), 1);
  return slabs;
}

// Calls f(i) for i in [0, count), in order within each thread's stretch.
template <typename F>
void for_stretches(const Problem& p, const Parallel& parallel, std::int64_t count, const F& f) {
  if (parallel.run == nullptr || parallel.threads <= 1 || count <= 1 || p.elements() < kSerialElements) {
    return f(std::int64_t{0}, count);
  }
  const auto body = [](std::int64_t begin, std::int64_t end, void* context) {
    (*static_cast<const F*>(context))(begin, end);
  };
  parallel.run(0, count, ceil_div(count, parallel.threads), body, const_cast<F*>(&f));
}

// `kRows` values of each channel of a slab.
template <typename Value>
struct Table {
  Value* values;
  std::int64_t width;

  Value* operator[](int row) const { return values + row * width; }
};

template <typename Pass>
void run_slab_by_slab(const Slabs& slabs, const Parallel& parallel, const Pass& pass) {
  for_stretches(slabs.problem, parallel, slabs.count, [&](std::int64_t begin, std::int64_t end) {
    typename Pass::Real fact_values[Pass::kFacts * kMaxWidth];
    typename Pass::Partial total_values[Pass::kPartials * kMaxWidth];
    typename Pass::Partial partial_values[Pass::kPartials * kMaxWidth];
    for (std::int64_t slab = begin; slab < end; ++slab) {
      const Part first = slabs.part(slab, 0);
      const Table<typename Pass::Real> facts{fact_values, first.width};
      const Table<typename Pass::Partial> total{total_values, first.width};
      const Table<typename Pass::Partial> partial{partial_values, first.width};
      pass.begin(first, facts);
      pass.reduce(first, facts, total);
      for (std::int64_t j = 1; j < slabs.parts; ++j) {
        pass.reduce(slabs.part(slab, j), facts, partial);
        pass.merge(slabs.part(slab, j), partial, total);
      }
      pass.finish(first, total, facts);
      for (std::int64_t j = slabs.parts; j-- > 0;) pass.write(slabs.part(slab, j), facts);
    }
  });
}

template <typename Pass>
void run_together(const Slabs& slabs, const Parallel& parallel, const Pass& pass) {
  using Real = typename Pass::Real;
  using Partial = typename Pass::Partial;
  const std::int64_t channels = slabs.problem.channels;
  const std::int64_t parts = slabs.count * slabs.parts;
  const std::unique_ptr<Real[]> fact_values(new Real[static_cast<std::size_t>(Pass::kFacts * channels)]);
  const std::unique_ptr<Partial[]> partial_values(
      new Partial[static_cast<std::size_t>(slabs.parts * Pass::kPartials * channels)]);
  const auto part = [&](std::int64_t k) { return slabs.part(k / slabs.parts, k % slabs.parts); };
  const auto facts = [&](const Part& slab) {
    return Table<Real>{&fact_values[Pass::kFacts * slab.channel], slab.width};
  };
  const auto partial = [&](const Part& slab, std::int64_t j) {
    return Table<Partial>{&partial_values[Pass::kPartials * (j * channels + slab.channel)], slab.width};
  };

  for (std::int64_t k = 0; k < parts; k += slabs.parts) pass.begin(part(k), facts(part(k)));
  for_stretches(slabs.problem, parallel, parts, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) pass.reduce(part(k), facts(part(k)), partial(part(k), k % slabs.parts));
  });
  for (std::int64_t k = 0; k < parts; k += slabs.parts) {
    const Part slab = part(k);
    for (std::int64_t j = 1; j < slabs.parts; ++j) pass.merge(part(k + j), partial(slab, j), partial(slab, 0));
    pass.finish(slab, partial(slab, 0), facts(slab));
  }
  for_stretches(slabs.problem, parallel, parts, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = end; k-- > begin;) pass.write(part(k), facts(part(k)));
  });
}

// A pass has begin (a slab: what reduce has to know), reduce (a part), merge (a part into those before it), finish (a slab)
// and write (a part). Either a thread does one slab after the other, which then is still in its cache when it is written; or,
// where that would leave threads idle, all threads share all slabs and meet between reduce and write.
template <typename Pass>
void run(const Slabs& slabs, const Parallel& parallel, const Pass& pass) {
  const std::int64_t threads = std::max(parallel.threads, 1);
  const bool even = 4 * ceil_div(slabs.count, threads) * threads <= 5 * slabs.count;
  if (threads == 1 || slabs.parts == 1 || even) {
    run_slab_by_slab(slabs, parallel, pass);
  } else {
    run_together(slabs, parallel, pass);
  }
}

}  // namespace brn::cpu
