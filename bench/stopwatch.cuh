// Time between two events on a GPU, with nothing of the host in it: see stopwatch.py.
#pragma once

#include "check.cuh"

#include <cuda_runtime.h>

namespace bench {

__device__ inline void wait(long long cycles) {
  const long long began = clock64();
  while (clock64() - began < cycles) {
  }
}

__global__ void spin(long long cycles) { wait(cycles); }

// Milliseconds of what `run()` queues on the stream.
template <typename Run>
float milliseconds(cudaStream_t stream, Run run) {
  constexpr long long kLeast = 200'000, kMost = 3'200'000;  // cycles
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start), "cudaEventCreate");
  check(cudaEventCreate(&stop), "cudaEventCreate");
  bool late = true;  // the spin was over while there was still something to queue
  for (long long cycles = kLeast; late && cycles <= kMost; cycles *= 2) {
    spin<<<1, 1, 0, stream>>>(cycles);
    check(cudaEventRecord(start, stream), "cudaEventRecord");
    run();
    check(cudaEventRecord(stop, stream), "cudaEventRecord");
    late = cudaEventQuery(start) == cudaSuccess;
    cudaGetLastError();  // cudaErrorNotReady would stay there
    check(cudaEventSynchronize(stop), "timed run");
  }
  float ms = 0;
  check(cudaEventElapsedTime(&ms, start, stop), "cudaEventElapsedTime");
  check(cudaEventDestroy(start), "cudaEventDestroy");
  check(cudaEventDestroy(stop), "cudaEventDestroy");
  return ms;
}

}  // namespace bench
