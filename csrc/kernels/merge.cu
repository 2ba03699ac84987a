// The messages of all ranks become one batch's statistics, and what a training step makes of them:
// one block, a thread a channel. Reads ranks * (2 * C + 2) doubles, twice with skip_nonfinite.
#include "../core/ranks.h"
#include "launch.cuh"
#include "launch.h"
#include "step.cuh"

#include <cuda_runtime.h>

namespace brn {
namespace {

template <typename Real>
__global__ void __launch_bounds__(kMaxThreads) merge_kernel(MergeParams params) {
  __shared__ Step<Real> step;
  __shared__ Total total;
  __shared__ unsigned nonfinite;
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int channels = static_cast<int>(params.channels);
  if (thread == 0) {
    total = total_of(params.gathered, params.ranks, params.channels);
    step = fixed_step<Real>(params, 0);
    if (step.follows_counter) follow_counter(params, step);
    params.total[0] = total.count;
    params.total[1] = total.backward;
    nonfinite = 0;
  }
  __syncthreads();

  if (params.skip_nonfinite) {
    for (int c = thread; c < channels; c += threads) {
      const Moments<Real> m =
          merge_ranks<Real>(params.gathered, params.ranks, params.channels, c).moments;
      if (!(isfinite(m.mean) && isfinite(m.m2))) atomicOr(&nonfinite, 1u);
    }
    __syncthreads();
  }
  const bool any = total.count > 0.0;
  const bool moves = any && nonfinite == 0;

  Real* running_mean = static_cast<Real*>(params.running_mean);
  Real* running_std = static_cast<Real*>(params.running_std);
  for (int c = thread; c < channels; c += threads) {
    const PivotedMoments<Real> all =
        merge_ranks<Real>(params.gathered, params.ranks, params.channels, c);
    const Running<Real> running = running_mean ? Running<Real>{running_mean[c], running_std[c]}
                                               : Running<Real>{Real(0), Real(1)};
    ChannelStats<Real> stats{};
    if (any) stats = channel_stats(all.moments, all.pivot, step.epsilon, running, step.limits);
    write_stats(params, params.channels, c, stats);
    if (running_mean && moves) {
      const Running<Real> next =
          moved(running, all.moments, all.pivot, step.epsilon, step.momentum);
      running_mean[c] = next.mean;
      running_std[c] = next.std;
    }
  }
  // `step` holds what the counter said: nobody reads it any more.
  if (thread == 0 && params.num_batches_tracked && moves) *params.num_batches_tracked += 1;
}

}  // namespace

int launch_merge(const MergeParams& params, cudaStream_t stream) {
  Plan one_block;
  one_block.threads = kMaxThreads;
  one_block.team = one_block.teams = 1;
  return params.dtype == DType::kFloat64
             ? launch(merge_kernel<double>, one_block, false, stream, params)
             : launch(merge_kernel<float>, one_block, false, stream, params);
}

}  // namespace brn
