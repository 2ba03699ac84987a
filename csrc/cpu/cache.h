// The second-level cache of a core, in which a slab has to find room, and what its prefetchers
// leave to be done.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__unix__)
#include <unistd.h>
#endif

namespace brn::cpu {

// What a larger one is good for has not been measured.
constexpr std::int64_t kMostL2Bytes = 1024 * 1024;

inline std::int64_t find_l2_bytes() {
  constexpr std::int64_t kLeastL2Bytes = 256 * 1024;
  std::int64_t found = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  return found > 0 ? std::clamp(found, kLeastL2Bytes, kMostL2Bytes) : kMostL2Bytes;
}

// As the C library tells it, within these bounds.
inline std::int64_t l2_bytes() {
  static const std::int64_t bytes = find_l2_bytes();
  return bytes;
}

inline bool is_intel() {
#if defined(__x86_64__)
  static const bool intel = __builtin_cpu_is("intel");
  return intel;
#else
  return false;
#endif
}

// Whether to fetch the next slab while one is written (see runs.h). It pays on both EPYCs of
// slabs.h; Intel's Emerald Rapids loses by it, forward and backward of one thread, float32 and
// bfloat16: (32, 64, 56, 56) 1.09, 1.16, 1.13 and 1.10 times as fast without it, (8, 128, 28,
// 28) 1.14, 1.07, 1.16 and 1.09.
inline bool fetching_ahead_pays() { return !is_intel(); }

// Bytes from what is read in a row to what is fetched, since prefetchers stop where a page ends; 0:
// nothing. Emerald Rapids, one thread, without against with it: forward of (1, 64, 112, 112)
// float32 410 and 334 us, of (1, 512, 28, 28) bfloat16 140 and 100, inference of (4, 512, 28, 28)
// bfloat16 423 and 324; two kilobytes 352, 112 and 326, eight 332, 99 and 324. Others have not been
// measured.
inline std::int64_t fetched_ahead_bytes() { return is_intel() ? 4096 : 0; }

// Whether a short plane is fetched all the way to the L1. On Emerald Rapids, one thread, float32,
// so against to the L2: forward and backward of (4, 2048, 7, 7) 1.16 and 1.12, of (4, 1024, 14, 14)
// 1.12 and 1.07 times as fast. The EPYC with AVX-512 loses by it: see fetch() in lanes.h.
inline bool fetching_to_l1_pays() { return is_intel(); }

}  // namespace brn::cpu
