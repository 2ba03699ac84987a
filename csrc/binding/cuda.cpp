// The operators on CUDA: guard, plan, allocate, launch.
#include "operators.h"
#include "workspace.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>

#include <cuda_runtime.h>

// Weak: a CPU-only torch has no such function, and the CPU operators must load there.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(std::int32_t device, void** stream);

namespace brn::binding {
namespace {

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  require(aoti_torch_get_current_cuda_stream != nullptr, "x is on ", DeviceOf{x},
          ", but this torch has no CUDA");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

Tensor new_bytes(const Tensor& x, std::int64_t bytes) {
  return empty(x, ScalarType::Byte, std::array<std::int64_t, 1>{bytes});
}

void check_launch(cudaError_t error, const char* pass) {
  // Either, depending on whether a launch or cudaFuncSetAttribute meets it first.
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();
    require(false, "batchrenorm_cuda: no ", pass,
            " kernel was built for this GPU. Build again with TORCH_CUDA_ARCH_LIST set to its "
            "compute capability "
            "(`python -m batchrenorm_cuda doctor` prints the command)");
  }
  check_cuda(error, pass);
}

void check_counts(const Problem& p) {
  require(p.channels <= kMostChannels, "on a GPU x may have 2^30 channels, got ", p.channels);
}

Device planned_for(const DeviceState& state) {
  return {state.sm_count, static_cast<double>(state.l2_bytes), state.shared_bytes,
          state.capability};
}

// A process loads its kernels as it launches them first, in a capture maybe.
template <typename Launch>
cudaError_t launched(Launch launch) {
  const RelaxedCapture relaxed;
  return static_cast<cudaError_t>(launch());
}

// Launches what `run(plan, workspace)` launches; if the device does not hold all the blocks at
// once, without shared memory (the process may have asked for a large L1, which leaves less shared
// memory), then on half the SMs, and so on: another process may hold a part of it (MPS), the stream
// may be given a part of it only (green contexts), or a tool may give each block more registers.
template <typename Run>
void launch_team(const char* pass, const Problem& p, const Tensor& x, cudaStream_t stream,
                 bool counts, bool proposes, Plans DeviceState::* plans, Run run) {
  check_counts(p);
  DeviceState& state = device_state(x.get_device_index());
  std::optional<Tensor> proposals, partials;
  Workspace workspace;
  if (proposes) {
    proposals = new_bytes(x, proposals_bytes(p));
    workspace.proposals = proposals->mutable_data_ptr();
  }
  cudaError_t error = cudaErrorUnknown;
  Device device = planned_for(state);
  Plan plan = (state.*plans).of(p, device);
  for (;;) {
    require(plan.share <= kMostShare, "x of ", p.elements(), " elements is too large for the ",
            device.sm_count, " multiprocessors of the GPU that this process may use");
    if (const std::int64_t bytes = partials_bytes(p, plan)) {
      partials = new_bytes(x, bytes);
      workspace.partials = partials->mutable_data_ptr();
    }
    if (counts || plan.team > 1) workspace.control = state.control.slot(stream, state.sm_count);
    error = launched([&] { return run(plan, workspace); });
    if (error != cudaErrorCooperativeLaunchTooLarge) break;
    cudaGetLastError();
    if (plan.prefetch || plan.retained) {
      device.shared_bytes = 0;
    } else {
      device.sm_count /= 2;
      device.shared_bytes = state.shared_bytes;
    }
    if (device.sm_count == 0) break;
    plan = (state.*plans).planner()(p, device);
  }
  check_launch(error, pass);
}

// The dispatcher comes here if any tensor is on a GPU, x or not.
std::int32_t gpu_of(const Tensor& x) {
  require(x.is_cuda(), "x must be on the device of the other tensors, a GPU, got ", DeviceOf{x});
  return x.get_device_index();
}

struct Cuda {
  // The dispatcher does not make a tensor's device current.
  struct Guard : torch::stable::accelerator::DeviceGuard {
    explicit Guard(const Tensor& x) : DeviceGuard(gpu_of(x)) {}
  };

  static void forward(const Problem& p, const ForwardParams& params, const Tensor& x) {
    const cudaStream_t stream = current_stream(x);
    launch_team("forward", p, x, stream, params.num_batches_tracked || params.skip_nonfinite,
                params.skip_nonfinite, &DeviceState::forward_plans,
                [&](const Plan& plan, const Workspace& w) {
                  return launch_forward(p, plan, params, w, stream);
                });
  }

  static void backward(const Problem& p, const BackwardParams& params, const Tensor& x) {
    const cudaStream_t stream = current_stream(x);
    launch_team("backward", p, x, stream, false, false, &DeviceState::backward_plans,
                [&](const Plan& plan, const Workspace& w) {
                  return launch_backward(p, plan, params, w, stream);
                });
  }

  static void inference(const Problem& p, const InferenceParams& params, const Tensor& x) {
    check_counts(p);
    const Device device = planned_for(device_state(x.get_device_index()));
    const cudaStream_t stream = current_stream(x);
    const Plan plan = plan_inference(p, device);
    check_launch(launched([&] { return launch_inference(p, plan, params, stream); }), "inference");
  }

  static void moments(const Problem& p, const MomentsParams& params, const Tensor& x) {
    const cudaStream_t stream = current_stream(x);
    launch_team("moments", p, x, stream, false, false, &DeviceState::forward_plans,
                [&](const Plan& plan, const Workspace& w) {
                  return launch_moments(p, plan, params, w, stream);
                });
  }

  static void merge(const MergeParams& params, const Tensor& gathered) {
    const cudaStream_t stream = current_stream(gathered);
    check_launch(launched([&] { return launch_merge(params, stream); }), "merge");
  }

  static void backward_sums(const Problem& p, const BackwardSumsParams& params, const Tensor& x) {
    const cudaStream_t stream = current_stream(x);
    launch_team("backward_sums", p, x, stream, false, false, &DeviceState::backward_plans,
                [&](const Plan& plan, const Workspace& w) {
                  return launch_backward_sums(p, plan, params, w, stream);
                });
  }

  static void backward_project(const Problem& p, const BackwardProjectParams& params,
                               const Tensor& x) {
    check_counts(p);
    const Device device = planned_for(device_state(x.get_device_index()));
    const cudaStream_t stream = current_stream(x);
    const Plan plan = plan_backward_project(p, device);
    check_launch(launched([&] { return launch_backward_project(p, plan, params, stream); }),
                 "backward_project");
  }
};

STABLE_TORCH_LIBRARY_IMPL(batchrenorm, CUDA, m) { add_operators<Cuda>(m); }

}  // namespace
}  // namespace brn::binding
