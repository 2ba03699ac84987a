// csrc/binding/cuda.cpp on the emulator: the CUDA operators as they are, plan and workspace and
// kernels, registered for CPU tensors in place of the CPU's. A library to load after
// batchrenorm_cuda, into a process that does nothing else.
//
// Four names are not what they are on a GPU: which tensors are a GPU's, what makes a device
// current, the dispatch key, and who allocates.
#include "../../csrc/binding/require.h"
#include "../../csrc/binding/workspace.h"
#include "scheduler.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace {

cudaStream_t current = nullptr;

// What is allocated during a capture stays, as in a graph's own pool.
AOTITorchError allocate(std::int64_t dim, const std::int64_t* sizes, const std::int64_t* strides,
                        std::int32_t dtype, std::int32_t device, std::int32_t index,
                        AtenTensorHandle* made) {
  const AOTITorchError error =
      aoti_torch_empty_strided(dim, sizes, strides, dtype, device, index, made);
  if (error == AOTI_TORCH_SUCCESS && current != nullptr && current->capture != 0) {
    AtenTensorHandle kept = nullptr;
    return aoti_torch_new_tensor_handle(*made, &kept);
  }
  return error;
}

}  // namespace

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(std::int32_t) {}
};
}  // namespace torch::stable::accelerator

#define aoti_torch_empty_strided allocate
#include "../../csrc/binding/operators.h"
#undef aoti_torch_empty_strided

#define CUDA CPU
#define is_cuda is_cpu
#define DeviceGuard NoGuard
#include "../../csrc/binding/cuda.cpp"
#undef CUDA
#undef is_cuda
#undef DeviceGuard

#pragma GCC visibility push(default)
extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(std::int32_t, void** stream) {
  static CUstream_st first;
  *stream = current != nullptr ? current : &first;
  return AOTI_TORCH_SUCCESS;
}

// A chip that says it has `sm_count` SMs, and of which `lent` are to be had. Before any operator.
void simt_chip(int sm_count, int lent, int order, unsigned seed) {
  fake.attributes[cudaDevAttrMultiProcessorCount] = sm_count;
  // As many blocks as the kernels with most have; test_emulator.py counts each kernel's own.
  simt::configure({lent, brn::blocks_per_sm(brn::Layout::kChannelsFirst, 2)},
                  static_cast<simt::Order>(order), seed);
}

// Operators go to the stream of this number from here on; into a capture, if that is not 0.
void simt_stream(unsigned long long id, unsigned long long capture) {
  static std::map<unsigned long long, CUstream_st> streams;
  current = &streams[id];
  current->id = id;
  current->capture = capture;
}

// Runs what was captured. A cudaError_t.
int simt_replay(unsigned long long capture) {
  for (const auto& launch : fake.captured[capture])
    if (const cudaError_t error = launch(); error != cudaSuccess) return error;
  return cudaSuccess;
}

// Launches in a capture.
std::int64_t simt_captured(unsigned long long capture) {
  return static_cast<std::int64_t>(fake.captured[capture].size());
}

// Control words that a launch has left in another state than the next one needs: not zero, but for
// the bit that a barrier flips.
std::int64_t simt_control_words_in_use() {
  std::int64_t in_use = 0;
  for (const auto& [begin, size] : fake.chunks) {
    for (std::size_t i = 0; i < size; ++i) in_use += (begin[i] & 0x7fffffffu) != 0;
  }
  return in_use;
}

// Launches that were too large for what is lent of the chip.
std::int64_t simt_refused() { return fake.refused; }

// Bytes of shared memory that the last launch asked for.
std::int64_t simt_last_dynamic_shared() {
  return static_cast<std::int64_t>(simt::last_dynamic_shared());
}

// Every launch fails with this cudaError_t from here on; and so does every allocation of the
// binding's own, if that is cudaErrorMemoryAllocation.
void simt_fail(int error) {
  fake.out_of_memory = error == cudaErrorMemoryAllocation;
  fake.launch_error = static_cast<cudaError_t>(error);
}

// What the import of batchrenorm_cuda has found out, for this library's operators too.
void simt_trust_saved_tensor_hooks(int legible) { brn::binding::hooks_are_legible = legible != 0; }

}  // extern "C"
#pragma GCC visibility pop
