// C entry points for ctypes. Sizes come as arrays of 64-bit integers and pointers as they are, so
// that Python needs no struct layout. Problem: batch, channels, spatial, layout, dtype, alignment.
// Plan: its fields in order.
#include "../../csrc/core/plan.h"
#include "../../csrc/kernels/launch.h"

#include "scheduler.h"

#include <algorithm>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

// Weak, so that a library may hold the kernels of one pass alone.
namespace brn {
[[gnu::weak]] int launch_forward(const Problem&, const Plan&, const ForwardParams&,
                                 const Workspace&, CUstream_st*);
[[gnu::weak]] int launch_backward(const Problem&, const Plan&, const BackwardParams&,
                                  const Workspace&, CUstream_st*);
[[gnu::weak]] int launch_inference(const Problem&, const Plan&, const InferenceParams&,
                                   CUstream_st*);
[[gnu::weak]] int launch_moments(const Problem&, const Plan&, const MomentsParams&,
                                 const Workspace&, CUstream_st*);
[[gnu::weak]] int launch_merge(const MergeParams&, CUstream_st*);
[[gnu::weak]] int launch_backward_sums(const Problem&, const Plan&, const BackwardSumsParams&,
                                       const Workspace&, CUstream_st*);
[[gnu::weak]] int launch_backward_project(const Problem&, const Plan&, const BackwardProjectParams&,
                                          CUstream_st*);
}  // namespace brn

namespace {

using namespace brn;

Problem problem_of(const std::int64_t* f) {
  return {f[0],
          f[1],
          f[2],
          static_cast<Layout>(f[3]),
          static_cast<DType>(f[4]),
          static_cast<int>(f[5])};
}

Plan plan_of(const std::int64_t* f) {
  Plan p;
  p.slot_bytes = static_cast<int>(f[0]);
  p.columns = static_cast<int>(f[1]);
  p.slots = static_cast<int>(f[2]);
  p.threads = static_cast<int>(f[3]);
  p.team = static_cast<int>(f[4]);
  p.teams = static_cast<int>(f[5]);
  p.rounds = static_cast<int>(f[6]);
  p.retained = static_cast<int>(f[7]);
  p.prefetch = static_cast<int>(f[8]);
  p.share = f[9];
  p.slabs = f[10];
  return p;
}

void write_plan(const Plan& p, std::int64_t* f) {
  const std::int64_t fields[] = {p.slot_bytes, p.columns,  p.slots,    p.threads, p.team, p.teams,
                                 p.rounds,     p.retained, p.prefetch, p.share,   p.slabs};
  std::copy(std::begin(fields), std::end(fields), f);
}

}  // namespace

extern "C" {

// blocks_per_sm 0: what the kernels' launch bounds promise.
void simt_configure(const std::int64_t* problem, const std::int64_t* plan, int sm_count,
                    int blocks_per_sm, int order, unsigned seed) {
  const Problem p = as_planned(problem_of(problem), plan_of(plan));
  const int promised =
      blocks_per_sm > 0 ? blocks_per_sm : brn::blocks_per_sm(p.layout, size_of(p.dtype));
  simt::configure({sm_count, promised}, static_cast<simt::Order>(order), seed);
}

void simt_select_blocks(unsigned first, unsigned count) { simt::select_blocks(first, count); }

const char* simt_last_error() { return simt::last_error(); }

std::int64_t simt_last_dynamic_shared() {
  return static_cast<std::int64_t>(simt::last_dynamic_shared());
}

void simt_plan(int pass, const std::int64_t* problem, int sm_count, std::int64_t* plan) {
  const Problem p = problem_of(problem);
  const Device device{sm_count};
  switch (static_cast<Pass>(pass)) {
    case Pass::kForward: write_plan(plan_forward(p, device), plan); break;
    case Pass::kBackward: write_plan(plan_backward(p, device), plan); break;
    case Pass::kInference: write_plan(plan_inference(p, device), plan); break;
  }
}

void simt_plan_backward_project(const std::int64_t* problem, int sm_count, std::int64_t* plan) {
  write_plan(plan_backward_project(problem_of(problem), {sm_count}), plan);
}

// The plan of a pass without statistics that has these slots side by side, the planner's or not.
void simt_plan_blocks(int slots, const std::int64_t* problem, int slot_bytes, int columns,
                      std::int64_t* plan) {
  write_plan(plan_blocks(problem_of(problem), static_cast<Pass>(slots), slot_bytes, columns), plan);
}

// Completes a choice of slot, columns, slots, threads, team and what is in shared memory, so that a
// test can reach plans that its small tensors would not get from the planner.
void simt_cut(int pass, const std::int64_t* problem, int sm_count, std::int64_t* plan) {
  const Pass which = static_cast<Pass>(pass);
  const Plan chosen = plan_of(plan);
  write_plan(cut(as_planned(problem_of(problem), chosen), {sm_count}, which, chosen), plan);
}

double simt_estimate(int pass, const std::int64_t* problem, int sm_count,
                     const std::int64_t* plan) {
  const Plan q = plan_of(plan);
  return estimate(as_planned(problem_of(problem), q), q, {sm_count}, static_cast<Pass>(pass));
}

// Bytes of control words, partial results and proposals.
void simt_workspace(const std::int64_t* problem, const std::int64_t* plan, std::int64_t* bytes) {
  const Problem p = problem_of(problem);
  const Plan q = plan_of(plan);
  bytes[0] = control_words(q.teams) * 4;
  bytes[1] = partials_bytes(p, q);
  bytes[2] = proposals_bytes(p);
}

// pointers: x, y, weight, bias, running_mean, running_std, num_batches_tracked, schedule, stats,
// control, partials, proposals. numbers: r_max, d_max, momentum, epsilon.
int simt_forward(const std::int64_t* problem, const std::int64_t* plan, void** pointers,
                 const double* numbers, int skip_nonfinite) {
  ForwardParams params;
  params.x = pointers[0];
  params.y = pointers[1];
  params.weight = pointers[2];
  params.bias = pointers[3];
  params.running_mean = pointers[4];
  params.running_std = pointers[5];
  params.num_batches_tracked = static_cast<std::int64_t*>(pointers[6]);
  params.schedule = static_cast<const double*>(pointers[7]);
  params.stats = pointers[8];
  params.limits = {numbers[0], numbers[1]};
  params.momentum = numbers[2];
  params.epsilon = numbers[3];
  params.skip_nonfinite = skip_nonfinite != 0;
  Workspace workspace;
  workspace.control = static_cast<unsigned*>(pointers[9]);
  workspace.partials = pointers[10];
  workspace.proposals = pointers[11];
  return launch_forward(problem_of(problem), plan_of(plan), params, workspace, nullptr);
}

// pointers: dy, x, dx, weight, stats, running_mean, running_std, dweight, dbias, control, partials.
int simt_backward(const std::int64_t* problem, const std::int64_t* plan, void** pointers) {
  BackwardParams params;
  params.dy = pointers[0];
  params.x = pointers[1];
  params.dx = pointers[2];
  params.weight = pointers[3];
  params.stats = pointers[4];
  params.running_mean = pointers[5];
  params.running_std = pointers[6];
  params.dweight = pointers[7];
  params.dbias = pointers[8];
  Workspace workspace;
  workspace.control = static_cast<unsigned*>(pointers[9]);
  workspace.partials = pointers[10];
  return launch_backward(problem_of(problem), plan_of(plan), params, workspace, nullptr);
}

// pointers: x, y, weight, bias, stats, running_mean, running_std.
int simt_inference(const std::int64_t* problem, const std::int64_t* plan, void** pointers) {
  InferenceParams params;
  params.x = pointers[0];
  params.y = pointers[1];
  params.weight = pointers[2];
  params.bias = pointers[3];
  params.stats = pointers[4];
  params.running_mean = pointers[5];
  params.running_std = pointers[6];
  return launch_inference(problem_of(problem), plan_of(plan), params, nullptr);
}

// pointers: x, message, control, partials.
int simt_moments(const std::int64_t* problem, const std::int64_t* plan, void** pointers,
                 int backward) {
  MomentsParams params;
  params.x = pointers[0];
  params.message = static_cast<double*>(pointers[1]);
  params.backward = backward != 0;
  Workspace workspace;
  workspace.control = static_cast<unsigned*>(pointers[2]);
  workspace.partials = pointers[3];
  return launch_moments(problem_of(problem), plan_of(plan), params, workspace, nullptr);
}

// Of the problem only channels and dtype count, and no plan. pointers: gathered, running_mean,
// running_std, num_batches_tracked, schedule, stats, total. numbers: r_max, d_max, momentum,
// epsilon.
int simt_merge(const std::int64_t* problem, const std::int64_t*, void** pointers,
               const double* numbers, int ranks, int skip_nonfinite) {
  const Problem p = problem_of(problem);
  MergeParams params;
  params.gathered = static_cast<const double*>(pointers[0]);
  params.ranks = ranks;
  params.channels = p.channels;
  params.dtype = p.dtype;
  params.running_mean = pointers[1];
  params.running_std = pointers[2];
  params.num_batches_tracked = static_cast<std::int64_t*>(pointers[3]);
  params.schedule = static_cast<const double*>(pointers[4]);
  params.stats = pointers[5];
  params.total = static_cast<double*>(pointers[6]);
  params.limits = {numbers[0], numbers[1]};
  params.momentum = numbers[2];
  params.epsilon = numbers[3];
  params.skip_nonfinite = skip_nonfinite != 0;
  return launch_merge(params, nullptr);
}

// pointers: dy, x, stats, sums, dweight, dbias, control, partials.
int simt_backward_sums(const std::int64_t* problem, const std::int64_t* plan, void** pointers) {
  BackwardSumsParams params;
  params.dy = pointers[0];
  params.x = pointers[1];
  params.stats = pointers[2];
  params.sums = static_cast<double*>(pointers[3]);
  params.dweight = pointers[4];
  params.dbias = pointers[5];
  Workspace workspace;
  workspace.control = static_cast<unsigned*>(pointers[6]);
  workspace.partials = pointers[7];
  return launch_backward_sums(problem_of(problem), plan_of(plan), params, workspace, nullptr);
}

// pointers: dy, x, dx, weight, stats, sums, total.
int simt_backward_project(const std::int64_t* problem, const std::int64_t* plan, void** pointers) {
  BackwardProjectParams params;
  params.dy = pointers[0];
  params.x = pointers[1];
  params.dx = pointers[2];
  params.weight = pointers[3];
  params.stats = pointers[4];
  params.sums = static_cast<const double*>(pointers[5]);
  params.total = static_cast<const double*>(pointers[6]);
  return launch_backward_project(problem_of(problem), plan_of(plan), params, nullptr);
}

// Marks the bytes around a tensor for AddressSanitizer; nothing without it.
void simt_guard(void* begin, std::int64_t size, int guarded) {
#if defined(__SANITIZE_ADDRESS__)
  if (guarded != 0)
    __asan_poison_memory_region(begin, static_cast<std::size_t>(size));
  else
    __asan_unpoison_memory_region(begin, static_cast<std::size_t>(size));
#else
  (void)begin, (void)size, (void)guarded;
#endif
}

}  // extern "C"
