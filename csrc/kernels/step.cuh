// What a training step reads beside the batch, and the statistics that it leaves.
#pragma once

#include "../core/math.h"
#include "launch.h"

#include <cuda_runtime.h>

#include <cstdint>

namespace brn {

// What the schedule and the counter say of this batch, before the counter moves; and what the loop
// over slabs would keep a register for.
template <typename Real>
struct Step {
  Limits<Real> limits;
  Real momentum;
  Real epsilon;
  Real values;  // of a channel
  bool follows_counter;
};

__device__ __forceinline__ std::int64_t step_count(const StepParams& params) {
  return params.num_batches_tracked ? *params.num_batches_tracked : 0;
}

// All that the host has said itself.
template <typename Real>
__device__ __forceinline__ Step<Real> fixed_step(const StepParams& params, std::int64_t values) {
  Step<Real> step;
  step.limits = {Real(1), Real(0)};  // no history to correct towards
  if (params.running_mean)
    step.limits = {static_cast<Real>(params.limits.r_max), static_cast<Real>(params.limits.d_max)};
  step.momentum = static_cast<Real>(params.momentum);
  step.epsilon = static_cast<Real>(params.epsilon);
  step.values = static_cast<Real>(values);
  step.follows_counter = (params.running_mean && params.schedule) || params.momentum < 0.0;
  return step;
}

// What hangs on the counter: of a step that follows it. Waits for it and for the schedule.
template <typename Real>
__device__ __forceinline__ void follow_counter(const StepParams& params, Step<Real>& step) {
  const std::int64_t count = step_count(params);
  if (params.running_mean && params.schedule) {
    // limits_at(), one limit after the other: both at once take registers that the tile has (40
    // bytes of spills; ptxas, sm_80, 16-byte slots of kChannelsFirst).
#pragma unroll 1
    for (int k = 0; k < 2; ++k) {
      const double* s = params.schedule + 2 * k;
      const double limit =
          ramp(static_cast<double>(count), params.schedule[0], s[2], 1.0 - k, s[1]);
      (k == 0 ? step.limits.r_max : step.limits.d_max) = static_cast<Real>(limit);
    }
  }
  step.momentum = averaging_weight<Real>(params.momentum, count);
}

template <typename Real>
__device__ __forceinline__ void write_stats(const StepParams& params, std::int64_t channels, int c,
                                            ChannelStats<Real> s) {
  Real* row = static_cast<Real*>(params.stats) + c;
  row[0 * channels] = s.centre;
  row[1 * channels] = s.residue;
  row[2 * channels] = s.inv_std;
  row[3 * channels] = s.r;
  row[4 * channels] = s.d;
}

}  // namespace brn
