// The order of a pass that reduces nothing: as the tensor lies in memory.
#pragma once

#include "slabs.h"

#include <cstdint>

namespace brn::cpu {

// A pass has begin (a slab: what write has to know) and write (a part).
template <typename Pass>
void run_in_order(const Problem& p, const Parallel& parallel, const Pass& pass) {
  const Slabs slabs = cut_in_order(p);
  for_stretches(p, parallel, slabs.count * slabs.parts, [&](std::int64_t begin, std::int64_t end) {
    const Tables<Pass> tables(1, 0, slabs.widest());
    const auto facts = tables.facts(0);
    for (std::int64_t k = begin; k < end; ++k) {
      const Part part = slabs.part(k / slabs.parts, k % slabs.parts);
      if (k == begin || part.begin == 0) pass.begin(part, facts);
      pass.write(part, facts);
    }
  });
}

}  // namespace brn::cpu
