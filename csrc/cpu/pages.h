// Page faults of a fresh output. The C library gives large blocks back to the system and maps them
// anew (always above 32 MB), and then the first touch of its 4 KB pages can cost more than the
// pass: (32, 64, 112, 112) float32 forward, one thread, takes 75 ms so and 25 ms with pages of 2
// MB.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace brn::cpu {

// A hint, which costs a microsecond; it asks for nothing where the system keeps huge pages off.
inline void prefer_huge_pages(void* memory, std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::int64_t kLarge = std::int64_t{4} << 20;
  constexpr std::uintptr_t kPage = 4096;
  if (bytes < kLarge) return;
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t begin = (address + kPage - 1) / kPage * kPage;
  const std::uintptr_t end = (address + static_cast<std::uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(memory);
  static_cast<void>(bytes);
#endif
}

}  // namespace brn::cpu
