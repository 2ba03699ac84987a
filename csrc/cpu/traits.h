// What a processor's caches and prefetchers leave to be done, as it was measured on four of them.
// None of it changes a bit of any result.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__unix__)
#include <unistd.h>
#endif

namespace brn::cpu {

// As on the first EPYC of slabs.h and on Zen 3, and where nothing else is known.
struct Traits {
  // Bytes from what is read in a row to what is fetched, since prefetchers stop where a page ends;
  // 0: nothing. In kChannelsFirst by passes that reduce and by those that only write, and in
  // kChannelsLast by what writes.
  std::int64_t ahead = 0;
  std::int64_t ahead_in_order = 0;
  std::int64_t ahead_of_rows = 2048;

  // A tensor of more bytes is written past the caches, which spares reading what is overwritten.
  // Forward and backward of (32, 256, 56, 56) float32, one thread, in memory that has been written
  // before: 17.1 and 20.1 ms through the caches, 12.0 and 14.5 past them.
  std::int64_t streamed_forward = 32 << 20;
  std::int64_t streamed_backward = 32 << 20;
  std::int64_t streamed_in_order = 32 << 20;  // by a pass that reads nothing twice

  // The next slab of kChannelsFirst is fetched while one is written (see runs.h).
  bool next_slab = true;
  std::int64_t many_planes = 8;  // a channel, from which on it is

  bool to_l1 = false;           // a short plane of kChannelsFirst is fetched all the way to the L1
  bool rows_to_l1 = false;      // so is what tiles and writes fetch of kChannelsLast
  bool fetch_written = true;    // lines of long rows are fetched that will be written
  bool eight_together = false;  // eight long rows are written together, not four
};

// Emerald Rapids, one thread.
constexpr Traits intel_traits() {
  Traits t;
  // Forward of (1, 64, 112, 112) float32, of (1, 512, 28, 28) bfloat16, and inference of (4, 512,
  // 28, 28) bfloat16, us: 410, 140 and 423 without; 2 KB 352, 112 and 326; 4 KB 334, 100 and 324; 8
  // KB 332, 99 and 324.
  t.ahead = t.ahead_in_order = 4096;
  // Without against with it, forward and backward, float32 and bfloat16: (32, 64, 56, 56) 1.09,
  // 1.16, 1.13 and 1.10 times as fast, (8, 128, 28, 28) 1.14, 1.07, 1.16 and 1.09.
  t.next_slab = false;
  // An L3 of 105 MB for many cores. Forward, backward and inference of (32, 64, 56, 56)
  // float32, 25.7 MB, 1.28, 1.11 and 1.48; with a reader of what was written, which then comes from
  // memory, 1.17, 1.05 and 1.31, two threads 1.12, 1.04 and 1.25. The mean of five shapes of 12.8
  // to 16.8 MB in both layouts, with that reader: backward 1.08, two threads 1.03; but forward 1.02
  // and 0.91, inference 1.01 and 0.90.
  t.streamed_forward = t.streamed_in_order = 20 << 20;
  t.streamed_backward = 12 << 20;
  // Forward and backward, float32: (4, 2048, 7, 7) 1.16 and 1.12, (4, 1024, 14, 14) 1.12 and 1.07.
  t.to_l1 = true;
  return t;
}

// Zen 5, one thread: times as fast as with the first set, forward, backward and inference; where no
// shape is named, the geometric mean of 34 in kChannelsFirst or of 23 in kChannelsLast.
constexpr Traits zen5_traits() {
  Traits t;
  // 4 KB: 1.06, 1.01 and 1.23; (1, 512, 28, 28) float32 1.60, 0.99 and 1.30. 8 KB against that:
  // 1.01, 0.99 and 1.06.
  t.ahead = 4096;
  t.ahead_in_order = 8192;
  // Inference 1.06, (32, 128, 28, 28) bfloat16 1.42.
  t.ahead_of_rows = 8192;
  // An L3 of 32 MB for several cores. Forward and backward of (4, 256, 56, 56) float32, 12.8 MB,
  // 1.20 and 1.23, in kChannelsLast 1.33 and 1.10. With a ReLU of what was written, which then
  // comes from memory, 1.04 and 1.14, 1.12 and 1.06; but of 6.4 MB, (32, 256, 14, 14) in
  // kChannelsLast, 0.98 and 0.97, two threads 0.85 and 0.93.
  t.streamed_forward = t.streamed_backward = 8 << 20;
  // Inference, one thread and two: (4096, 1024) float32, 16.8 MB, 1.39 and 1.36, but of 12.8 MB,
  // (4, 64, 112, 112) 1.10 and 0.93, in kChannelsLast 1.10 and 0.86.
  t.streamed_in_order = 14 << 20;
  // Without it (32, 1024, 14, 14) float32 0.85 and 0.90. Four planes instead of eight: bfloat16,
  // (4, 256, 56, 56) 1.11 and 1.05, (4, 2048, 7, 7) 1.26 and 1.36; float32, (4, 1024, 14, 14) 1.02
  // and 1.04, (4, 2048, 7, 7) 0.91 and 1.11. Two: (2, 512, 28, 28) float32 0.87 and 0.87.
  t.many_planes = 4;
  // 1.04 and 1.02; (4, 2048, 7, 7) float32 1.66 and 1.13, (4, 1024, 14, 14) bfloat16 1.26 and 1.11.
  t.to_l1 = true;
  // 1.04, 1.07 and 1.04 with the last one (two threads 1.00, 0.99 and 1.00); inference of (4, 1024,
  // 14, 14) float32 1.13.
  t.rows_to_l1 = true;
  t.eight_together = true;
  // 1.02, 1.04 and 1.12.
  t.fetch_written = false;
  return t;
}

// Whose settings they are. BATCHRENORM_CPU_TRAITS may name another processor, to test and to time
// its settings on this one.
struct NamedTraits {
  const char* name;
  Traits traits;
};
constexpr NamedTraits kKnownTraits[] = {
    {"other", {}}, {"intel", intel_traits()}, {"zen5", zen5_traits()}};

inline const char* processor() {
#if defined(__x86_64__)
  if (__builtin_cpu_is("intel")) return "intel";
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  // An L1 of 48 KB came with Zen 5, whose name compilers know since GCC 14. Some virtual machines
  // tell 64 KB, whatever they run on.
  constexpr std::int64_t kL1Bytes = 48 * 1024;
  if (__builtin_cpu_is("amd") && sysconf(_SC_LEVEL1_DCACHE_SIZE) == kL1Bytes) return "zen5";
#endif
#endif
  return "other";
}

inline NamedTraits find_traits() {
  const char* const names[] = {std::getenv("BATCHRENORM_CPU_TRAITS"), processor()};
  for (const char* name : names) {
    for (const NamedTraits& known : kKnownTraits) {
      if (name != nullptr && std::strcmp(name, known.name) == 0) return known;
    }
  }
  return kKnownTraits[0];
}

inline const NamedTraits& named_traits() {
  static const NamedTraits found = find_traits();
  return found;
}
inline const Traits& traits() { return named_traits().traits; }

}  // namespace brn::cpu
