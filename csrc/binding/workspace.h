// Control words for launches whose blocks meet or count: memory that is zero before its first use
// ever and that every launch leaves ready for the next.
//
// Two launches that may overlap must not share a slot. Eager work on one stream runs in order, so a
// slot belongs to a stream. A captured graph may be replayed on another stream while eager work
// runs, so what is captured never shares with eager work: it takes a slot for its capture and its
// stream, which no later capture is given. (A graph does not overlap itself.) Streams of eager work
// are told apart by their id: a handle may be used again for another stream while work of the first
// is still under way. Those of a capture by their handle: to ask a capturing stream for its id is
// cudaErrorStreamCaptureUnsupported, and the end of the capture.
//
// The first call may well come during a capture, so a slot is never allocated by torch, whose pool
// would belong to the graph, nor zeroed on the capturing stream, which would make a memset node of
// it. Slots are cut from chunks.
#pragma once

#include "../core/geometry.h"
#include "plans.h"
#include "require.h"

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

namespace brn::binding {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error that is reported must not surface again in someone else's call
  require(false, "batchrenorm_cuda: ", what, ": ", cudaGetErrorName(error), ": ",
          cudaGetErrorString(error));
}

// Lets this thread allocate, and load kernels, while one of its streams, or another thread's, is
// being captured.
class RelaxedCapture {
 public:
  RelaxedCapture() {
    check_cuda(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode");
  }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// The slots of one device. They are never given back: a captured graph may hold on to its own for
// as long as the process lives, and 64 of them are 1.6 MB on a chip of 132 SMs.
class ControlPool {
 public:
  // The slot for work on `stream` as it is now, eager or capturing. The device must be current.
  unsigned* slot(cudaStream_t stream, int sm_count) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long capture = 0, id = 0;
    check_cuda(cudaStreamGetCaptureInfo(stream, &status, &capture), "cudaStreamGetCaptureInfo");
    const bool capturing = status != cudaStreamCaptureStatusNone;
    if (capturing) {
      id = reinterpret_cast<std::uintptr_t>(stream);
    } else {
      check_cuda(cudaStreamGetId(stream, &id), "cudaStreamGetId");
    }
    const Key key{capturing, capture, id};

    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = slots_.find(key);
    if (found != slots_.end()) return found->second;
    if (left_ == 0) grow(sm_count);
    --left_;
    unsigned* slot = next_;
    next_ += words(sm_count);
    slots_.emplace(key, slot);
    return slot;
  }

 private:
  using Key =
      std::tuple<bool, unsigned long long, unsigned long long>;  // capturing, capture id, stream
  static constexpr int kSlotsOfChunk = 64;

  // As many teams as the chip can hold when they have two blocks each; a lone block needs no
  // barrier.
  static std::int64_t words(int sm_count) {
    constexpr int kMostBlocks = blocks_per_sm(Layout::kChannelsFirst, 2);
    static_assert(kMostBlocks >= blocks_per_sm(Layout::kChannelsLast, 2),
                  "the layout with more blocks sizes the slots");
    return control_words(sm_count * kMostBlocks / 2);
  }

  // On a stream of its own, waited for: the chunk is zero for every stream that will use it, and no
  // capture sees it.
  void grow(int sm_count) {
    const RelaxedCapture relaxed;
    const std::size_t bytes =
        static_cast<std::size_t>(words(sm_count)) * sizeof(unsigned) * kSlotsOfChunk;
    void* chunk = nullptr;
    cudaStream_t stream = nullptr;
    check_cuda(cudaMalloc(&chunk, bytes), "cudaMalloc of control words");
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking),
               "cudaStreamCreateWithFlags");
    cudaError_t error = cudaMemsetAsync(chunk, 0, bytes, stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
    check_cuda(error, "zeroing control words");
    next_ = static_cast<unsigned*>(chunk);
    left_ = kSlotsOfChunk;
  }

  std::mutex mutex_;
  std::map<Key, unsigned*> slots_;
  unsigned* next_ = nullptr;
  int left_ = 0;
};

// What is known of a device, once for the process. Never destroyed: streams may outlive static
// destructors.
struct DeviceState {
  int sm_count = 0;
  int l2_bytes = 0;
  int shared_bytes = 0;  // of an SM
  int capability = 0;    // 10 * major + minor
  ControlPool control;
  Plans forward_plans{plan_forward};
  Plans backward_plans{plan_backward};
};

inline DeviceState& device_state(int device) {
  static std::mutex mutex;
  static auto* states =
      new std::map<int, DeviceState>;  // nodes stay where they are as the map grows
  const std::lock_guard<std::mutex> lock(mutex);
  DeviceState& state = (*states)[device];
  if (state.sm_count == 0) {
    const auto attribute = [device](cudaDeviceAttr which) {
      int value = 0;
      check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
      return value;
    };
    state.l2_bytes = attribute(cudaDevAttrL2CacheSize);
    state.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    state.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                       attribute(cudaDevAttrComputeCapabilityMinor);
    state.sm_count = attribute(cudaDevAttrMultiProcessorCount);  // last: says that all are there
  }
  return state;
}

}  // namespace brn::binding
