// The sweeps for x86-64 with AVX-512.
#if defined(__x86_64__)
// The standard library first: its functions are shared with files compiled for less.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define BRN_VECTOR_BYTES 64
#include "sweeps.h"

namespace brn::cpu {

const Isa& isa_avx512() {
  static constexpr Isa isa = table("avx512");
  return isa;
}

}  // namespace brn::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
