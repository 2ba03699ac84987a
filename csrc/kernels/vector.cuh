// Slots: 16, 8, 4 or 2 bytes that a thread moves in one access, kept packed in registers and
// widened where they are used.
//
// Loads and stores carry streaming hints: what is read once and kept, and what is written, must not
// push x out of L2.
#pragma once

#include "../core/types.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

namespace brn {

// The type of statistics and of all arithmetic for tensors of T.
template <typename T>
using RealOf = std::conditional_t<std::is_same<T, double>::value, double, float>;

// 32-bit registers that hold a slot; a slot of two bytes uses the low half of one.
template <int kWords>
struct Words {
  unsigned w[kWords];
};

// Without this the compiler keeps the widened copy of 16-bit data alive from one pass over the
// registers to the next: up to 268 bytes of spills (ptxas, sm_100). With it, none.
template <int kWords>
__device__ __forceinline__ void keep_packed(Words<kWords>& bits) {
#if defined(__CUDACC__)
#pragma unroll
  for (int k = 0; k < kWords; ++k) asm volatile("" : "+r"(bits.w[k]));
#else
  (void)bits;
#endif
}

// Word by word: a choice between structs would be one of addresses, and put both into local memory.
template <int kWords>
__device__ __forceinline__ Words<kWords> chosen(bool first, const Words<kWords>& a,
                                                const Words<kWords>& b) {
  Words<kWords> bits;
#pragma unroll
  for (int k = 0; k < kWords; ++k) bits.w[k] = first ? a.w[k] : b.w[k];
  return bits;
}

// kOnce: the last time this launch reads the address. kAgain: it will read it again, from L2 if it
// is still there. kByEveryWarp: the block's other warps read it now, through the L1. kShared: it is
// in shared memory.
enum class Reuse { kOnce, kAgain, kByEveryWarp, kShared };

template <Reuse kReuse, typename V>
__device__ __forceinline__ V load_bits(const void* p) {
  const V* typed = static_cast<const V*>(p);
  if constexpr (kReuse == Reuse::kShared) {
    return *typed;
  } else if constexpr (kReuse == Reuse::kByEveryWarp) {
    return __ldca(typed);
  } else {
    return kReuse == Reuse::kOnce ? __ldcs(typed) : __ldcg(typed);
  }
}

template <int kBytes, Reuse kReuse>
__device__ __forceinline__ Words<(kBytes + 3) / 4> load_words(const void* p) {
  if constexpr (kBytes == 16) {
    const uint4 v = load_bits<kReuse, uint4>(p);
    return {{v.x, v.y, v.z, v.w}};
  } else if constexpr (kBytes == 8) {
    const uint2 v = load_bits<kReuse, uint2>(p);
    return {{v.x, v.y}};
  } else if constexpr (kBytes == 4) {
    return {{load_bits<kReuse, unsigned>(p)}};
  } else {
    return {{load_bits<kReuse, unsigned short>(p)}};
  }
}

// Asks for the line in L2: it is read soon, by this block. Nothing waits for it. Not in L1, which
// every look at the team's barrier empties: an acquire is a load and CCTL.IVALL (SASS, sm_90).
__device__ __forceinline__ void expect_line(const void* p) {
#if defined(__CUDACC__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
  (void)__ldca(static_cast<const char*>(p));  // no such line: the emulator says so
#endif
}

// Where a slot is stored to.
enum class Memory { kGlobal, kShared };

template <Memory kMemory, typename V>
__device__ __forceinline__ void store_bits(void* p, V v) {
  if constexpr (kMemory == Memory::kShared) {
    *static_cast<V*>(p) = v;
  } else {
    __stcs(static_cast<V*>(p), v);
  }
}

template <int kBytes, Memory kMemory>
__device__ __forceinline__ void store_words(void* p, const Words<(kBytes + 3) / 4>& bits) {
  if constexpr (kBytes == 16) {
    store_bits<kMemory>(p, make_uint4(bits.w[0], bits.w[1], bits.w[2], bits.w[3]));
  } else if constexpr (kBytes == 8) {
    store_bits<kMemory>(p, make_uint2(bits.w[0], bits.w[1]));
  } else if constexpr (kBytes == 4) {
    store_bits<kMemory>(p, bits.w[0]);
  } else {
    store_bits<kMemory>(p, static_cast<unsigned short>(bits.w[0]));
  }
}

// Two 16-bit floats of a word, low half first.
template <typename T>
__device__ __forceinline__ float2 widen(unsigned word) {
  if constexpr (std::is_same<T, __half>::value) {
    __half2 pair;
    std::memcpy(&pair, &word, sizeof pair);
    return __half22float2(pair);
  } else {
    // A bfloat16 is the upper half of a float. As C shifts this costs 128 registers and 136 bytes
    // of spills in the channels-last forward kernel; as prmt and and, 113 registers and no spill
    // (ptxas, sm_90).
#if defined(__CUDACC__)
    unsigned low;
    unsigned high;
    asm("prmt.b32 %0, 0, %1, 0x5410;" : "=r"(low) : "r"(word));
    asm("and.b32 %0, %1, 0xffff0000;" : "=r"(high) : "r"(word));
#else
    const unsigned low = word << 16;
    const unsigned high = word & 0xffff0000u;
#endif
    return make_float2(__uint_as_float(low), __uint_as_float(high));
  }
}

template <typename T>
__device__ __forceinline__ unsigned narrow(float low, float high) {
  using Pair = std::conditional_t<std::is_same<T, __half>::value, __half2, __nv_bfloat162>;
  Pair pair;
  if constexpr (std::is_same<T, __half>::value) {
    pair = __floats2half2_rn(low, high);
  } else {
    pair = __floats2bfloat162_rn(low, high);
  }
  unsigned word;
  std::memcpy(&word, &pair, sizeof word);
  return word;
}

template <typename T, int kSlotBytes>
struct Slot {
  static_assert(kSlotBytes <= 16 && kSlotBytes % sizeof(T) == 0,
                "one hardware access, whole elements");
  using Element = T;
  using Real = RealOf<T>;
  using Bits = Words<(kSlotBytes + 3) / 4>;
  static constexpr int kBytes = kSlotBytes;
  static constexpr int kLanes = kSlotBytes / static_cast<int>(sizeof(T));

  template <Reuse kReuse>
  __device__ __forceinline__ static Bits load(const void* p) {
    return load_words<kSlotBytes, kReuse>(p);
  }

  // One access too: Words is aligned to 4 bytes only, and would be read word by word.
  __device__ __forceinline__ static Bits load_shared(const void* p) {
    return load_words<kSlotBytes, Reuse::kShared>(p);
  }

  __device__ __forceinline__ static void store_shared(void* p, const Bits& bits) {
    store_words<kSlotBytes, Memory::kShared>(p, bits);
  }

  __device__ __forceinline__ static Bits zero() { return Bits{}; }

  __device__ __forceinline__ static void unpack(const Bits& bits, Real (&value)[kLanes]) {
    if constexpr (std::is_same<T, double>::value) {
      std::memcpy(value, bits.w, sizeof value);
    } else if constexpr (std::is_same<T, float>::value) {
#pragma unroll
      for (int k = 0; k < kLanes; ++k) value[k] = __uint_as_float(bits.w[k]);
    } else if constexpr (kLanes == 1) {
      value[0] = widen<T>(bits.w[0]).x;
    } else {
#pragma unroll
      for (int k = 0; k < kLanes / 2; ++k) {
        const float2 pair = widen<T>(bits.w[k]);
        value[2 * k] = pair.x;
        value[2 * k + 1] = pair.y;
      }
    }
  }

  __device__ __forceinline__ static void store(void* p, const Real (&value)[kLanes]) {
    Bits bits;
    if constexpr (std::is_same<T, double>::value) {
      std::memcpy(bits.w, value, sizeof value);
    } else if constexpr (std::is_same<T, float>::value) {
#pragma unroll
      for (int k = 0; k < kLanes; ++k) bits.w[k] = __float_as_uint(value[k]);
    } else if constexpr (kLanes == 1) {
      bits.w[0] = narrow<T>(value[0], 0.0f);
    } else {
#pragma unroll
      for (int k = 0; k < kLanes / 2; ++k) bits.w[k] = narrow<T>(value[2 * k], value[2 * k + 1]);
    }
    store_words<kSlotBytes, Memory::kGlobal>(p, bits);
  }
};

}  // namespace brn
