// Small kernels that break a rule each, to show that the emulator notices. test_emulator_rules.py
// names them by number.
#include "scheduler.h"

#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

namespace {

__global__ void obeys(unsigned* out) {
  __shared__ unsigned sum[2];
  if (threadIdx.x < 2) sum[threadIdx.x] = 0;
  __syncthreads();
  unsigned value = 1;
  for (int distance = 16; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  if (threadIdx.x % 32 == 0) sum[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = sum[0] + sum[1];
}

__global__ void reads_shared_memory_that_nobody_wrote(unsigned* out) {
  __shared__ unsigned word[64];
  if (threadIdx.x == 0) out[blockIdx.x] = word[threadIdx.x];
  word[threadIdx.x] = 0;
}

__global__ void leaves_a_thread_behind(unsigned* out) {
  if (threadIdx.x == 5) __syncwarp();
  __syncthreads();
  out[blockIdx.x] = 1;
}

__global__ void meets_at_two_barriers(unsigned* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[blockIdx.x] = 1;
}

__global__ void shuffles_half_a_warp(unsigned* out) {
  if (threadIdx.x % 32 < 16) out[blockIdx.x] = __shfl_down_sync(0x0000ffffu, threadIdx.x, 1u);
}

__global__ void shuffles_without_some_lanes(unsigned* out) {
  if (threadIdx.x % 32 < 16) out[blockIdx.x] = __shfl_down_sync(0xffffffffu, threadIdx.x, 1u);
}

__global__ void loads_misaligned(unsigned* out) {
  const uint2 v = __ldcs(reinterpret_cast<const uint2*>(reinterpret_cast<const char*>(out) + 4));
  out[blockIdx.x] = v.x;
}

__global__ void waits_for_ever(unsigned* out) {
  if (threadIdx.x == 0) {
    while (__atomic_load_n(out, __ATOMIC_ACQUIRE) != gridDim.x) __nanosleep(20);
  }
  __syncthreads();
}

__global__ void waits_for_the_others(unsigned* out) {
  if (threadIdx.x == 0) {
    atomicAdd(out, 1u);
    while (__atomic_load_n(out, __ATOMIC_ACQUIRE) < gridDim.x) __nanosleep(20);
  }
  __syncthreads();
}

__global__ void takes_tickets(unsigned* out) {
  if (threadIdx.x % 32 == 0) {
    const unsigned ticket = atomicAdd(out, 1u);
    out[1 + ticket] = blockIdx.x * 2 + threadIdx.x / 32;
  }
}

__device__ unsigned* buffer() { return static_cast<unsigned*>(::simt::dynamic_shared(0, 4)); }

__global__ void copies(unsigned* out) {
  __pipeline_memcpy_async(buffer() + threadIdx.x, out + 63, 4);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  if (threadIdx.x == 5) out[blockIdx.x] = buffer()[5] + 64;
}

__global__ void reads_an_early_copy(unsigned* out) {
  buffer()[threadIdx.x] = 0;
  __pipeline_memcpy_async(buffer() + threadIdx.x, out + 63, 4);
  if (threadIdx.x == 5) out[blockIdx.x] = buffer()[5];
  __pipeline_wait_prior(0);
}

__global__ void ends_before_its_copy(unsigned* out) {
  if (threadIdx.x == 5) __pipeline_memcpy_async(buffer(), out, 4);
}

__global__ void overwrites_what_it_copies(unsigned* out) {
  if (threadIdx.x == 5) {
    __pipeline_memcpy_async(buffer(), out + 63, 4);
    ++out[63];
    __pipeline_wait_prior(0);
  }
}

__global__ void copies_twice_to_one_place(unsigned* out) {
  __pipeline_memcpy_async(buffer() + threadIdx.x / 2 * 2, out + 62, 8);
  __syncthreads();
  __pipeline_wait_prior(0);
}

__global__ void copies_beyond_its_memory(unsigned* out) {
  __pipeline_memcpy_async(buffer() + 1 + threadIdx.x, out + 63, 4);
  __pipeline_wait_prior(0);
}

__global__ void reaches_beyond_its_memory(unsigned* out) {
  out[blockIdx.x] = *static_cast<unsigned*>(::simt::dynamic_shared(threadIdx.x * 4 + 4, 4));
}

void (*const kKernels[])(unsigned*) = {
    obeys,
    reads_shared_memory_that_nobody_wrote,
    leaves_a_thread_behind,
    meets_at_two_barriers,
    shuffles_half_a_warp,
    shuffles_without_some_lanes,
    loads_misaligned,
    waits_for_ever,
    waits_for_the_others,
    takes_tickets,
    copies,
    reads_an_early_copy,
    ends_before_its_copy,
    overwrites_what_it_copies,
    copies_twice_to_one_place,
    copies_beyond_its_memory,
    reaches_beyond_its_memory,
};

}  // namespace

extern "C" {

int rules_run(int kernel, unsigned blocks, int cooperative, int order, unsigned seed,
              unsigned* out) {
  simt::configure({2, 2}, static_cast<simt::Order>(order), seed);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(64);
  config.dynamicSmemBytes = 64 * sizeof(unsigned);
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaFuncSetAttribute(kKernels[kernel], cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(config.dynamicSmemBytes));
  return cudaLaunchKernelEx(&config, kKernels[kernel], out);
}

const char* rules_last_error() { return simt::last_error(); }
}
