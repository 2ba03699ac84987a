// Page faults of a fresh output. The C library maps blocks above 32 MB anew for each allocation,
// and a kernel then spends most of its time in the first touch of 4 KB pages.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace brn::cpu {

inline void prefer_huge_pages(void* memory, std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::int64_t kOwnMapping = std::int64_t{4} << 20;
  constexpr std::uintptr_t kPage = 4096;
  if (bytes < kOwnMapping) return;
  const std::uintptr_t begin =
      (reinterpret_cast<std::uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const std::uintptr_t end =
      (reinterpret_cast<std::uintptr_t>(memory) + static_cast<std::uintptr_t>(bytes)) / kPage *
      kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin,
          MADV_HUGEPAGE);  // a hint: if it is not taken, nothing is lost
#else
  static_cast<void>(memory);
  static_cast<void>(bytes);
#endif
}

}  // namespace brn::cpu
