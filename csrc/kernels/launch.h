// The seam between bindings and kernels: parameter packs and launchers, for CUDA and (the packs)
// for the CPU. Pointers are untyped here and typed again behind the launcher, so that this header
// needs neither CUDA nor Torch.
//
// T is the dtype of the problem; Real is float, and double for double tensors.
#pragma once

#include "../core/geometry.h"
#include "../core/math.h"
#include "../core/types.h"

#include <cstdint>

struct CUstream_st;  // cudaStream_t, forward-declared as in driver_types.h

namespace brn {

// Memory that blocks of one launch meet in. Two launches that may overlap must not share one; the
// CPU needs none.
struct Workspace {
  // control_words(plan.teams) words, zero before their first use ever; every launch leaves them
  // ready for the next. Not touched by teams of one block that count no steps.
  unsigned* control = nullptr;
  void* partials = nullptr;   // partials_bytes() in any state; may be null where that is 0
  void* proposals = nullptr;  // proposals_bytes() in any state; needed with skip_nonfinite
};

// What a training step does once it has a channel's moments: statistics, r and d, moving averages
// and step counter.
struct StepParams {
  // Updated in place; both null: r = 1, d = 0.
  void* running_mean = nullptr;  // Real [C]
  void* running_std = nullptr;   // Real [C]

  // The limits of r and d: of the schedule at *num_batches_tracked, or, without one, fixed.
  std::int64_t* num_batches_tracked = nullptr;  // [1], incremented; null: steps are not counted
  const double* schedule = nullptr;             // [5], a Schedule, or null
  Limits<double> limits = {1.0, 0.0};

  void* stats = nullptr;        // Real [kStatRows][C], written: rows as ChannelStats
  double momentum = 0.01;       // kCumulative: 1 / (*num_batches_tracked + 1)
  double epsilon = 1e-5;        // inside the root
  bool skip_nonfinite = false;  // a NaN or inf in x leaves moving averages and counter alone
};

// The limits of the batch that comes after `step` others.
template <typename Real>
BRN_HD Limits<Real> limits_of(const StepParams& params, std::int64_t step) {
  if (!params.running_mean) return {Real(1), Real(0)};  // no history to correct towards
  if (const double* s = params.schedule)
    return limits_at<Real>({s[0], s[1], s[2], s[3], s[4]}, step);
  return {static_cast<Real>(params.limits.r_max), static_cast<Real>(params.limits.d_max)};
}

struct ForwardParams : StepParams {
  const void* x = nullptr;       // T, as the problem's layout says
  void* y = nullptr;             // as x
  const void* weight = nullptr;  // Real [C], or null: 1
  const void* bias = nullptr;    // Real [C], or null: 0
};

// y = weight * (x_norm * r + d) + bias with the statistics at hand: inference with the moving ones,
// or a training step repeated with its own.
struct InferenceParams {
  const void* x = nullptr;             // T
  void* y = nullptr;                   // T
  const void* weight = nullptr;        // Real [C], or null: 1
  const void* bias = nullptr;          // Real [C], or null: 0
  const void* stats = nullptr;         // Real [kStatRows][C] of a training step; null: inference
  const void* running_mean = nullptr;  // Real [C], for inference
  const void* running_std = nullptr;   // Real [C], for inference
};

struct BackwardParams {
  const void* dy = nullptr;            // T
  const void* x = nullptr;             // T
  void* dx = nullptr;                  // T
  const void* weight = nullptr;        // Real [C], or null: 1
  const void* stats = nullptr;         // Real [kStatRows][C] of a training step; null: inference
  const void* running_mean = nullptr;  // Real [C], for inference
  const void* running_std = nullptr;   // Real [C], for inference
  void* dweight = nullptr;             // Real [C], written
  void* dbias = nullptr;               // Real [C], written
};

// A training step that several ranks take together, in four passes and two collectives:
//
//   moments           x -> this rank's message, which all gather
//   merge             all messages -> stats, moving averages and counter, the same on every rank;
//                     inference normalises with the stats
//   backward_sums     dy, x -> the rank's reductions, which all add up, and its own dweight, dbias
//   backward_project  dy, x, all sums -> dx
struct MomentsParams {
  const void* x = nullptr;    // T
  double* message = nullptr;  // [message_length(C)], written; see core/ranks.h
  bool backward = false;      // whether the rank takes part in the backward pass
};

struct MergeParams : StepParams {
  const double* gathered = nullptr;  // [ranks][message_length(channels)]
  int ranks = 0;
  std::int64_t channels = 0;
  DType dtype = DType::kFloat32;  // of x, hence Real
  double* total = nullptr;        // [2], written: a Total
};

struct BackwardSumsParams {
  const void* dy = nullptr;     // T
  const void* x = nullptr;      // T
  const void* stats = nullptr;  // Real [kStatRows][C]
  double* sums = nullptr;       // [2][C], written: sum(dy), sum(dy * (x - mean))
  void* dweight = nullptr;      // Real [C], written: this rank's
  void* dbias = nullptr;        // Real [C], written: this rank's
};

struct BackwardProjectParams {
  const void* dy = nullptr;       // T
  const void* x = nullptr;        // T
  void* dx = nullptr;             // T
  const void* weight = nullptr;   // Real [C], or null: 1
  const void* stats = nullptr;    // Real [kStatRows][C]
  const double* sums = nullptr;   // [2][C], of all ranks
  const double* total = nullptr;  // [2], a Total
};

// One kernel launch each. The plan is the one that plan_forward (also for moments), plan_backward
// (also for backward_sums), plan_inference or plan_backward_project makes for the problem. Return a
// cudaError_t as int: cudaSuccess (0), or the error of the launch.
int launch_forward(const Problem&, const Plan&, const ForwardParams&, const Workspace&,
                   CUstream_st* stream);
int launch_backward(const Problem&, const Plan&, const BackwardParams&, const Workspace&,
                    CUstream_st* stream);
int launch_inference(const Problem&, const Plan&, const InferenceParams&, CUstream_st* stream);
int launch_moments(const Problem&, const Plan&, const MomentsParams&, const Workspace&,
                   CUstream_st* stream);
int launch_merge(const MergeParams&, CUstream_st* stream);
int launch_backward_sums(const Problem&, const Plan&, const BackwardSumsParams&, const Workspace&,
                         CUstream_st* stream);
int launch_backward_project(const Problem&, const Plan&, const BackwardProjectParams&,
                            CUstream_st* stream);

}  // namespace brn
