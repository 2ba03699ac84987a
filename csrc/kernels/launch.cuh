// From a plan to a kernel: the choice of instantiation and the launch itself, the same for the
// three passes.
#pragma once

#include "launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <map>
#include <mutex>

namespace brn {

// What a kernel is compiled for.
template <typename T_, Layout kLayout_, int kSlotBytes_>
struct Variant {
  using T = T_;
  static constexpr Layout kLayout = kLayout_;
  static constexpr int kSlotBytes = kSlotBytes_;
};

template <typename T, Layout kLayout, typename Run>
cudaError_t dispatch_slot(int slot_bytes, Run run) {
  switch (slot_bytes) {
    case 16: return run(Variant<T, kLayout, 16>{});
    case 8: return run(Variant<T, kLayout, 8>{});
    case 4:
      if constexpr (sizeof(T) <= 4) return run(Variant<T, kLayout, 4>{});
      break;
    case 2:
      if constexpr (sizeof(T) <= 2) return run(Variant<T, kLayout, 2>{});
      break;
    default: break;
  }
  return cudaErrorInvalidValue;
}

template <Layout kLayout, typename Run>
cudaError_t dispatch_dtype(DType dtype, int slot_bytes, Run run) {
  switch (dtype) {
    case DType::kFloat32: return dispatch_slot<float, kLayout>(slot_bytes, run);
    case DType::kFloat16: return dispatch_slot<__half, kLayout>(slot_bytes, run);
    case DType::kBFloat16: return dispatch_slot<__nv_bfloat16, kLayout>(slot_bytes, run);
    case DType::kFloat64: return dispatch_slot<double, kLayout>(slot_bytes, run);
  }
  return cudaErrorInvalidValue;
}

template <typename Run>
cudaError_t dispatch_bundles(DType dtype, Run run) {
  switch (dtype) {
    case DType::kFloat32: return run(Variant<float, Layout::kBundles, 16>{});
    case DType::kFloat16: return run(Variant<__half, Layout::kBundles, 16>{});
    case DType::kBFloat16: return run(Variant<__nv_bfloat16, Layout::kBundles, 16>{});
    case DType::kFloat64: break;
  }
  return cudaErrorInvalidValue;
}

template <typename Run>
cudaError_t dispatch_unaligned(DType dtype, Run run) {
  switch (dtype) {
    case DType::kFloat16: return run(Variant<__half, Layout::kUnaligned, 16>{});
    case DType::kBFloat16: return run(Variant<__nv_bfloat16, Layout::kUnaligned, 16>{});
    case DType::kFloat32:
    case DType::kFloat64: break;
  }
  return cudaErrorInvalidValue;
}

// Calls run(Variant{}) with the variant that the plan names.
template <typename Run>
cudaError_t dispatch(const Problem& p, const Plan& plan, Run run) {
  switch (layout_of(p, plan)) {
    case Layout::kChannelsFirst:
      return dispatch_dtype<Layout::kChannelsFirst>(p.dtype, plan.slot_bytes, run);
    case Layout::kChannelsLast:
      return dispatch_dtype<Layout::kChannelsLast>(p.dtype, plan.slot_bytes, run);
    case Layout::kBundles:
      if (plan.slot_bytes == 16) return dispatch_bundles(p.dtype, run);
      break;
    case Layout::kUnaligned:
      if (plan.slot_bytes == 16) return dispatch_unaligned(p.dtype, run);
      break;
  }
  return cudaErrorInvalidValue;
}

// cudaLaunchKernelEx rather than <<<...>>>: an ordinary C++ call, which tests/simt can stand in
// for. Blocks that wait for one another must all be resident at once, which only a cooperative
// launch promises: without it two such kernels on two streams can each hold the SMs that the other
// waits for.
template <typename... Expected, typename... Actual>
cudaError_t launch_with(std::size_t shared_bytes, void (*kernel)(Expected...), const Plan& plan,
                        bool cooperative, cudaStream_t stream, const Actual&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;

  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks()));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

template <typename... Expected, typename... Actual>
cudaError_t launch(void (*kernel)(Expected...), const Plan& plan, bool cooperative,
                   cudaStream_t stream, const Actual&... args) {
  return launch_with(0, kernel, plan, cooperative, stream, args...);
}

// The shared memory that a kernel may ask for, by device. Every kernel may have 48 KB, its static
// arrays included; for more it has to be allowed once: no work for a stream, and so nothing that a
// capture would refuse or record.
class Allowed {
 public:
  // The most that any launch has asked for stays allowed, whatever another one asks for meanwhile.
  template <typename Kernel>
  cudaError_t at_least(int bytes, Kernel* kernel) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    const std::lock_guard<std::mutex> lock(mutex_);
    int& most = most_[device];
    if (bytes <= most) return cudaSuccess;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) most = bytes;
    return error;
  }

 private:
  std::mutex mutex_;
  std::map<int, int> most_;
};

// As launch(), of a kernel whose blocks may meet and that takes these bytes of shared memory.
template <typename... Expected, typename... Actual>
cudaError_t launch_meeting(Allowed& allowed, int shared_bytes, void (*kernel)(Expected...),
                           const Plan& plan, cudaStream_t stream, const Actual&... args) {
  if (shared_bytes > 0) {
    const cudaError_t error = allowed.at_least(shared_bytes, kernel);
    if (error != cudaSuccess) return error;
  }
  return launch_with(shared_bytes, kernel, plan, plan.team > 1, stream, args...);
}

}  // namespace brn
