// What a training step reads beside the batch, and the statistics that it leaves.
#pragma once

#include "../core/math.h"
#include "launch.h"

#include <cuda_runtime.h>

#include <cstdint>

namespace brn {

// What the schedule and the counter say of this batch, before the counter moves.
template <typename Real>
struct Step {
  Limits<Real> limits;
  Real momentum;
};

__device__ __forceinline__ std::int64_t step_count(const StepParams& params) {
  return params.num_batches_tracked ? *params.num_batches_tracked : 0;
}

template <typename Real>
__device__ __forceinline__ Step<Real> step_of(const StepParams& params) {
  // Before the counter, so that both are on their way at once: a block's first loads wait for this.
  const double* s = params.running_mean ? params.schedule : nullptr;
  Schedule schedule{};
  if (s) schedule = {s[0], s[1], s[2], s[3], s[4]};
  const std::int64_t count = step_count(params);
  const Real momentum = averaging_weight<Real>(params.momentum, count);
  return {s ? limits_at<Real>(schedule, count) : limits_of<Real>(params, count), momentum};
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
