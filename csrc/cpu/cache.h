// The second-level cache of a core, in which a slab has to find room, and what its other caches and
// its prefetchers leave to be done.
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

// What a processor's caches and prefetchers leave to be done. Bytes, but for what is a question.
struct Traits {
  // To lines that are fetched, from what is read in a row, since prefetchers stop where a page
  // ends; 0: nothing. In kChannelsFirst by passes that reduce, by those that only write, and in
  // kChannelsLast by what writes.
  std::int64_t ahead;
  std::int64_t ahead_in_order;
  std::int64_t ahead_of_rows;
  std::int64_t streamed;  // a larger tensor is written past the caches
  bool next_slab;         // is the next slab fetched while one is written (see runs.h)?
  bool to_l1;             // is a short plane fetched all the way to the L1?
  bool written;           // are lines of long rows fetched that will be written?
};

// Measured on the first EPYC of slabs.h and on Zen 3. Writing past the caches spares reading what
// is overwritten. Forward and backward of (32, 256, 56, 56) float32, one thread, in memory that has
// been written before: 17.1 and 20.1 ms through the caches, 12.0 and 14.5 past them.
inline constexpr Traits kTraits{0, 0, 2048, 32 << 20, true, false, true};

// Emerald Rapids, one thread. Nothing fetched against 4 KB ahead: forward of (1, 64, 112, 112)
// float32 410 and 334 us, of (1, 512, 28, 28) bfloat16 140 and 100, inference of (4, 512, 28, 28)
// bfloat16 423 and 324; 2 KB 352, 112 and 326, 8 KB 332, 99 and 324. Without fetching the next
// slab, forward and backward, float32 and bfloat16: (32, 64, 56, 56) 1.09, 1.16, 1.13 and 1.10
// times as fast, (8, 128, 28, 28) 1.14, 1.07, 1.16 and 1.09. To the L1, so against to the L2:
// float32, (4, 2048, 7, 7) 1.16 and 1.12, (4, 1024, 14, 14) 1.12 and 1.07.
inline constexpr Traits kIntelTraits{4096, 4096, 2048, 32 << 20, false, true, true};

// Zen 5, one thread, against the first; where no shape is named the mean of 34 in kChannelsFirst or
// of 14 in kChannelsLast. 4 KB ahead: forward 1.06, inference 1.23 times as fast, (1, 512, 28, 28)
// float32 1.60 and 1.30; 8 KB against 4: forward 1.01, backward 0.99, inference 1.06. Rows, 8 KB
// against 2: inference 1.06, (32, 128, 28, 28) bfloat16 1.42. To the L1: (4, 2048, 7, 7) float32,
// forward and backward 1.66 and 1.13, (4, 1024, 14, 14) bfloat16 1.26 and 1.11. What is written not
// fetched: 1.02, 1.04, inference 1.12. From 8 MB on past the caches, of which four cores and more
// share 32 MB: (4, 256, 56, 56) float32 1.20 and 1.23, in channels_last 1.33 and 1.10; a ReLU of y
// included, which then reads it from memory, 1.04 and 1.14, 1.12 and 1.06; but with it (32, 256,
// 14, 14) in channels_last, 6.4 MB, 0.98 and 0.97. Without fetching the next slab: (32, 1024, 14,
// 14) float32 0.85 and 0.90.
inline constexpr Traits kZen5Traits{4096, 8192, 8192, 8 << 20, true, true, false};

inline Traits find_traits() {
#if defined(__x86_64__)
  if (__builtin_cpu_is("intel")) return kIntelTraits;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  // An L1 of 48 KB came with Zen 5; compilers know its name since GCC 14.
  if (__builtin_cpu_is("amd") && sysconf(_SC_LEVEL1_DCACHE_SIZE) >= 48 * 1024) return kZen5Traits;
#endif
#endif
  return kTraits;
}

// Those of the kind of processor that was measured and is most like this one.
inline const Traits& traits() {
  static const Traits found = find_traits();
  return found;
}

}  // namespace brn::cpu
