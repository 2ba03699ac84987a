// The CPU kernels behind the same parameter packs as the CUDA ones. They take their threads from
// the caller, so that this directory needs no Torch: the binding passes at::parallel_for.
#pragma once

#include "../core/types.h"
#include "../kernels/launch.h"

#include <cstdint>

namespace brn::cpu {

// Calls body(begin, end, context) on parts of [begin, end) of at least `grain`, in any order, on up
// to `threads` threads.
struct Parallel {
  int threads = 1;
  void (*run)(std::int64_t begin, std::int64_t end, std::int64_t grain,
              void (*body)(std::int64_t begin, std::int64_t end, void* context),
              void* context) = nullptr;
};

// Results do not depend on the number of threads.
void forward(const Problem&, const ForwardParams&, const Parallel&);
void backward(const Problem&, const BackwardParams&, const Parallel&);
void inference(const Problem&, const InferenceParams&, const Parallel&);

// The passes of a step that several ranks take together. x may be empty in none but merge's.
void moments(const Problem&, const MomentsParams&, const Parallel&);
void merge(const MergeParams&);
void backward_sums(const Problem&, const BackwardSumsParams&, const Parallel&);
void backward_project(const Problem&, const BackwardProjectParams&, const Parallel&);

}  // namespace brn::cpu
