// A CUDA runtime that runs kernels on the CPU, one fiber a thread, so that the .cu files under
// csrc/ can be tested where there is no GPU. Put this directory first on the include path; the
// sources need no change.
//
// It covers what the project's kernels use and nothing else: an unknown intrinsic is a compile
// error, and that is wanted. It is stricter than a GPU: a barrier or a shuffle that some
// participant never reaches, a shuffle of part of a warp, and a misaligned vector access end the
// launch with a message; shared memory is full of NaN when a block starts.
#pragma once

#include "../scheduler.h"
#include "cuda_host.h"

#include <math.h>  // isfinite and friends in the global namespace, as in device code

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __thread  // a resident block is an OS thread

// ---- built-in types and variables ----

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

namespace simt {
// Kernels of this project are one-dimensional.
struct Index {
  unsigned x;
};
}  // namespace simt

// Variables that the scheduler sets, not macros: cudaLaunchConfig_t has fields gridDim and blockDim
// too.
extern __thread ::simt::Index threadIdx, blockIdx, blockDim, gridDim;

// ---- barriers, shuffles, atomics ----

#define SIMT_HERE \
  ::simt::Site { file, line }
#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_SITE) { ::simt::sync_block(SIMT_HERE); }
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) {
  ::simt::exchange(SIMT_HERE, ::simt::Operation::kSyncWarp, mask, 0, ::simt::lane());
}
inline void __nanosleep(unsigned, SIMT_SITE) { ::simt::spin_pause(SIMT_HERE); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

namespace simt {
template <typename T>
T shuffle(Site site, Operation operation, unsigned mask, T value, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "what the hardware shuffles");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(site, operation, mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace simt

// A source outside the warp gives a lane its own value back, as on the GPU.
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, SIMT_SITE) {
  return ::simt::shuffle(SIMT_HERE, ::simt::Operation::kShuffleXor, mask, value,
                         ::simt::lane() ^ lane_mask);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, SIMT_SITE) {
  return ::simt::shuffle(SIMT_HERE, ::simt::Operation::kShuffleDown, mask, value,
                         ::simt::lane() + static_cast<int>(delta));
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, SIMT_SITE) {
  return ::simt::shuffle(SIMT_HERE, ::simt::Operation::kShuffle, mask, value, source & 31);
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// A block may be preempted on either side of an atomic operation, which other blocks see.
inline unsigned atomicAdd(unsigned* p, unsigned value) {
  const ::simt::AtomicPoint point;
  return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);
}
inline unsigned atomicOr(unsigned* p, unsigned value) {
  const ::simt::AtomicPoint point;
  return __atomic_fetch_or(p, value, __ATOMIC_SEQ_CST);
}
inline unsigned atomicExch(unsigned* p, unsigned value) {
  const ::simt::AtomicPoint point;
  return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  const ::simt::AtomicPoint point;
  unsigned old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
  while (!__atomic_compare_exchange_n(p, &old, old >= limit ? 0 : old + 1, false, __ATOMIC_SEQ_CST,
                                      __ATOMIC_SEQ_CST)) {
  }
  return old;
}

// ---- loads and stores with cache hints, conversions, arithmetic ----

template <typename T>
T __ldcs(const T* p, SIMT_SITE) {
  ::simt::check_access(SIMT_HERE, p, alignof(T));
  return *p;
}
template <typename T>
T __ldca(const T* p, SIMT_SITE) {
  ::simt::check_access(SIMT_HERE, p, alignof(T));
  return *p;
}
template <typename T>
T __ldcg(const T* p, SIMT_SITE) {
  ::simt::check_access(SIMT_HERE, p, alignof(T));
  return *p;
}
template <typename T>
T __ldg(const T* p, SIMT_SITE) {
  ::simt::check_access(SIMT_HERE, p, alignof(T));
  return *p;
}
template <typename T>
void __stcs(T* p, T value, SIMT_SITE) {
  ::simt::check_access(SIMT_HERE, p, alignof(T));
  *p = value;
}
template <typename T>
void __stcg(T* p, T value, SIMT_SITE) {
  ::simt::check_access(SIMT_HERE, p, alignof(T));
  *p = value;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

// ---- the runtime API ----

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };
union cudaLaunchAttributeValue {
  int cooperative;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    ::simt::allow_dynamic_shared(reinterpret_cast<const void*>(kernel),
                                 static_cast<std::size_t>(value));
  }
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorLaunchFailure: return ::simt::last_error();
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
    default: return "unrecognized error code";
  }
}
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "cudaErrorLaunchFailure" : "cudaError";
}

template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Actual&&... actual) {
  if (config->gridDim.y != 1 || config->gridDim.z != 1 || config->blockDim.y != 1 ||
      config->blockDim.z != 1) {
    return cudaErrorInvalidConfiguration;
  }
  if (fake.launch_error != cudaSuccess) return fake.launch_error;
  // A GPU allows every kernel 48 KB, static arrays included, without being asked.
  if (config->dynamicSmemBytes >
      ::simt::dynamic_shared_allowed(reinterpret_cast<const void*>(kernel))) {
    return cudaErrorInvalidValue;
  }
  bool cooperative = false;
  for (unsigned k = 0; k < config->numAttrs; ++k) {
    if (config->attrs[k].id == cudaLaunchAttributeCooperative)
      cooperative = config->attrs[k].val.cooperative != 0;
  }
  auto call = std::make_tuple(kernel, static_cast<Expected>(std::forward<Actual>(actual))...);
  using Call = decltype(call);
  auto run = [blocks = config->gridDim.x, threads = config->blockDim.x,
              shared = config->dynamicSmemBytes, cooperative, call]() mutable {
    return static_cast<cudaError_t>(::simt::run_grid(
        blocks, threads, shared, cooperative,
        [](void* p) {
          std::apply([](auto fn, auto... arguments) { fn(arguments...); }, *static_cast<Call*>(p));
        },
        &call));
  };
  // What is captured runs with every replay of the graph, and not now.
  if (config->stream != nullptr && config->stream->capture != 0) {
    // It may be the first launch of the kernel, which then has to be loaded.
    if (fake.mode != cudaStreamCaptureModeRelaxed) return cudaErrorStreamCaptureUnsupported;
    fake.captured[config->stream->capture].push_back(run);
    return cudaSuccess;
  }
  const cudaError_t error = run();
  fake.refused += error == cudaErrorCooperativeLaunchTooLarge;
  return error;
}

#undef SIMT_SITE
#undef SIMT_HERE
