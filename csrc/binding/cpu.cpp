// The operators on the CPU.
#include "../cpu/launch.h"
#include "operators.h"

namespace brn::binding {
namespace {

// at::parallel_for, which torch.set_num_threads governs, behind the stable ABI.
cpu::Parallel torch_threads() {
  cpu::Parallel parallel;
  parallel.threads = static_cast<int>(torch::stable::get_num_threads());
  parallel.run = [](std::int64_t begin, std::int64_t end, std::int64_t grain,
                    void (*body)(std::int64_t, std::int64_t, void*), void* context) {
    torch::stable::parallel_for(
        begin, end, grain, [&](std::int64_t from, std::int64_t to) { body(from, to, context); });
  };
  return parallel;
}

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static void forward(const Problem& p, const ForwardParams& params, const Tensor&) {
    cpu::forward(p, params, torch_threads());
  }
  static void backward(const Problem& p, const BackwardParams& params, const Tensor&) {
    cpu::backward(p, params, torch_threads());
  }
  static void inference(const Problem& p, const InferenceParams& params, const Tensor&) {
    cpu::inference(p, params, torch_threads());
  }
  static void moments(const Problem& p, const MomentsParams& params, const Tensor&) {
    cpu::moments(p, params, torch_threads());
  }
  static void merge(const MergeParams& params, const Tensor&) { cpu::merge(params); }
  static void backward_sums(const Problem& p, const BackwardSumsParams& params, const Tensor&) {
    cpu::backward_sums(p, params, torch_threads());
  }
  static void backward_project(const Problem& p, const BackwardProjectParams& params,
                               const Tensor&) {
    cpu::backward_project(p, params, torch_threads());
  }
};

STABLE_TORCH_LIBRARY_IMPL(batchrenorm, CPU, m) { add_operators<Cpu>(m); }

}  // namespace
}  // namespace brn::binding
