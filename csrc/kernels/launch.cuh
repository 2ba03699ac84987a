// From a plan to a kernel: the choice of instantiation and the launch itself, the same for the
// three passes.
#pragma once

#include "launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

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

// Calls run(Variant{}) with the variant that the plan names.
template <typename Run>
cudaError_t dispatch(const Problem& p, const Plan& plan, Run run) {
  return p.layout == Layout::kChannelsFirst
             ? dispatch_dtype<Layout::kChannelsFirst>(p.dtype, plan.slot_bytes, run)
             : dispatch_dtype<Layout::kChannelsLast>(p.dtype, plan.slot_bytes, run);
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

// The devices, by their bits, on which a kernel may have kPrefetchBytes.
using Allowed = std::atomic<std::uint64_t>;

// As launch(), of a kernel that follows plan.prefetch. With its static arrays that is more than the
// 48 KB that every kernel may have, so it is allowed once a device: no work for a stream, and so
// nothing that a capture would refuse or record.
template <typename... Expected, typename... Actual>
cudaError_t launch_prefetching(Allowed& allowed, void (*kernel)(Expected...), const Plan& plan,
                               cudaStream_t stream, const Actual&... args) {
  const bool cooperative = plan.team > 1;
  if (plan.prefetch == 0) return launch(kernel, plan, cooperative, stream, args...);
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const std::uint64_t bit = device < 64 ? std::uint64_t{1} << device : 0;
  if (error == cudaSuccess && (allowed.load(std::memory_order_relaxed) & bit) == 0) {
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kPrefetchBytes);
    if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
  }
  if (error != cudaSuccess) return error;
  return launch_with(kPrefetchBytes, kernel, plan, cooperative, stream, args...);
}

}  // namespace brn
