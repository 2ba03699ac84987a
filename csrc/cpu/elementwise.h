// The order of a pass that reduces nothing: as the tensor lies in memory.
#pragma once

#include "slabs.h"

#include <cstdint>

namespace brn::cpu {

// A pass has begin (a slab: what write has to know) and write (a part).
template <typename Pass>
void run_in_order(const Problem& p, const Parallel& parallel, const Pass& pass) {
  const Slabs slabs = cut_in_order(p);
  const std::int64_t count = slabs.count();
  for_stretches(p, parallel, count * slabs.parts(), [&](std::int64_t begin, std::int64_t end) {
    const Tables<Pass> tables(count, 0, slabs.widest());
    for (std::int64_t k = begin; k < end; ++k) {
      const std::int64_t slab = k % count;
      Part part = slabs.part(slab, k / count);
      part.in_order = true;
      if (p.layout == Layout::kChannelsFirst) {
        part.ahead = traits().ahead_in_order / size_of(p.dtype);
      }
      if (k < begin + count) pass.begin(part, tables.facts(slab));
      pass.write(part, tables.facts(slab));
    }
  });
}

}  // namespace brn::cpu
