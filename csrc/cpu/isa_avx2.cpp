// The sweeps for x86-64 with AVX2 and FMA.
#if defined(__x86_64__)
// The standard library first: its functions are shared with files compiled for less.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define BRN_VECTOR_BYTES 32
#include "sweeps.h"

namespace brn::cpu {

const Isa& isa_avx2() {
  static constexpr Isa isa = table("avx2");
  return isa;
}

}  // namespace brn::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
