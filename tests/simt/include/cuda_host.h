// What csrc/binding uses of the CUDA runtime, on the CPU: allocations that start full of rubbish,
// streams that may be capturing, devices as a test wants them, and a record of what was called
// under which capture mode.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <utility>
#include <vector>

struct CUstream_st {
  unsigned long long id = 0;
  unsigned long long capture = 0;  // 0: eager
};
using cudaStream_t = CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureImplicit = 906,
  cudaErrorUnknown = 999,
};
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
  // An H200, but for what a test changes. A device is asked once for what it is.
  std::map<cudaDeviceAttr, int> attributes = {
      {cudaDevAttrMultiProcessorCount, 132},
      {cudaDevAttrL2CacheSize, 60'000'000},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 << 10},
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0}};
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  bool out_of_memory = false;
  cudaError_t launch_error = cudaSuccess;  // of every launch
  int errors_cleared = 0;
  int refused = 0;       // cooperative launches
  int unsafe_calls = 0;  // that a capture in global mode would not have survived
  std::map<cudaStream_t, std::vector<std::pair<void*, std::size_t>>> unfinished;  // memsets
  std::vector<std::pair<unsigned*, std::size_t>> chunks;
  std::map<unsigned long long, std::vector<std::function<cudaError_t()>>> captured;  // launches

  void unsafe() { unsafe_calls += mode != cudaStreamCaptureModeRelaxed; }
};
inline FakeRuntime fake;

inline cudaError_t cudaGetLastError() {  // launches return what went wrong
  ++fake.errors_cleared;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = fake.attributes.at(attribute);
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
// NVIDIA's CUDA Experimental documents that it refuses, places::get_stream_id(); the runtime does
// not.
inline cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  if (stream->capture) return cudaErrorStreamCaptureUnsupported;
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
  *stream = new CUstream_st;
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
