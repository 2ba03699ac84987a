// The part of the CUDA runtime that csrc/binding/workspace.h uses, on the CPU: allocations that
// start full of rubbish, and a record of what was called under which capture mode.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

struct FakeStream {
  unsigned long long id = 0;
  unsigned long long capture = 0;  // 0: eager
};
using cudaStream_t = FakeStream*;

enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation, cudaErrorStreamCaptureImplicit };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrL2CacheSize,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
constexpr unsigned cudaStreamNonBlocking = 1;

struct FakeRuntime {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  bool out_of_memory = false;
  int errors_cleared = 0;
  int unsafe_calls = 0;  // that a capture in global mode would not have survived
  std::map<FakeStream*, std::vector<std::pair<void*, std::size_t>>> unfinished;  // memsets
  std::vector<std::pair<unsigned*, std::size_t>> chunks;

  void unsafe() { unsafe_calls += mode != cudaStreamCaptureModeRelaxed; }
};
inline FakeRuntime fake;

inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorMemoryAllocation"; }
inline const char* cudaGetErrorString(cudaError_t) { return "out of memory"; }
inline cudaError_t cudaGetLastError() {
  ++fake.errors_cleared;
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, fake.mode);
  return cudaSuccess;
}
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                            unsigned long long* id) {
  *status = stream->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (stream->capture) *id = stream->capture;
  return cudaSuccess;
}
inline cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  *id = stream->id;
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** pointer, std::size_t bytes) {
  fake.unsafe();
  if (fake.out_of_memory) return cudaErrorMemoryAllocation;
  *pointer = std::malloc(bytes);
  std::memset(*pointer, 0xa5, bytes);
  fake.chunks.emplace_back(static_cast<unsigned*>(*pointer), bytes / sizeof(unsigned));
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  fake.unsafe();
  *stream = new FakeStream;
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* pointer, int, std::size_t bytes, cudaStream_t stream) {
  fake.unfinished[stream].emplace_back(pointer, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  fake.unsafe();
  for (const auto& [pointer, bytes] : fake.unfinished[stream]) std::memset(pointer, 0, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = 100 + device;
  return cudaSuccess;
}
