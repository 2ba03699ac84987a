// Stands in for cuda.cpp in a build without a CUDA toolkit, so that a CUDA tensor gets an answer
// and not the dispatcher's list of backends.
#include "operators.h"

namespace brn::binding {
namespace {

struct NoCuda {
  struct Guard {
    explicit Guard(const Tensor&) {
      require(false,
              "batchrenorm_cuda was built without its CUDA kernels. Install a CUDA toolkit (nvcc) "
              "or set CUDA_HOME to one, "
              "then build again: pip install --no-build-isolation --force-reinstall --no-deps . "
              "(`python -m batchrenorm_cuda doctor` shows what this build has)");
    }
  };
  static void forward(const Problem&, const ForwardParams&, const Tensor&) {}
  static void backward(const Problem&, const BackwardParams&, const Tensor&) {}
  static void inference(const Problem&, const InferenceParams&, const Tensor&) {}
  static void moments(const Problem&, const MomentsParams&, const Tensor&) {}
  static void merge(const MergeParams&, const Tensor&) {}
  static void backward_sums(const Problem&, const BackwardSumsParams&, const Tensor&) {}
  static void backward_project(const Problem&, const BackwardProjectParams&, const Tensor&) {}
};

STABLE_TORCH_LIBRARY_IMPL(batchrenorm, CUDA, m) { add_operators<NoCuda>(m); }

}  // namespace
}  // namespace brn::binding
