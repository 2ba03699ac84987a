// Times every plan that a planner might choose, not only the one that it does: what the numbers in
// csrc/core/cost.h are to be set by. The kernels are the shipped ones; only the plan differs.
//
//   nvcc -O3 -std=c++17 -arch=native bench/sweep.cu csrc/kernels/{forward,backward}.cu -o sweep
//   ./sweep [seconds]
//
// First, for half of the seconds at most, what shared memory gains, for a prefetch or for rounds
// that registers do not hold: a line for each problem whose plan can use it, with it and without
// it. Then all plans, problem by problem, until the seconds are over: a line a plan, best first:
// us, fraction of the copy roof, the planner's own estimate; the plan that the planner chooses is
// marked.
#include "../csrc/core/plan.h"
#include "../csrc/kernels/launch.h"
#include "check.cuh"
#include "stopwatch.cuh"

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <random>
#include <vector>

namespace {

using bench::check;
using brn::Device;
using brn::DType;
using brn::Layout;
using brn::Pass;
using brn::Plan;
using brn::Problem;
using Clock = std::chrono::steady_clock;

constexpr int kSets = 3;     // of tensors, used in turn
constexpr int kCalls = 6;    // of one graph
constexpr int kSamples = 9;  // replays, of which the median counts

// Device memory for the largest problem, used by all of them.
struct Memory {
  char* x[kSets];
  char* dy[kSets];
  char* out[kSets];
  void* statistics;  // stats, running_mean, running_std, dweight, dbias: nine rows of channels
  unsigned* control;
  void* partials;
};

constexpr std::int64_t kMostBytes = std::int64_t{900} << 20;
constexpr std::int64_t kMostChannels = 4096;
constexpr std::int64_t kControlWords = 1 << 20;
constexpr std::int64_t kPartialBytes = 256 << 20;

// Random numbers that are finite and near 1, read as bfloat16 or as float32: constant data draws
// less power than data does.
void fill(char* tensor) {
  constexpr std::size_t kPattern = 8 << 20;
  static std::vector<std::uint16_t> pattern;
  if (pattern.empty()) {
    std::mt19937 random(0);
    pattern.resize(kPattern);
    for (std::uint16_t& bits : pattern) bits = 0x3f80 | (random() & 0x807f);
  }
  for (std::int64_t at = 0; at < kMostBytes; at += 2 * kPattern) {
    const std::size_t bytes = std::min<std::int64_t>(2 * kPattern, kMostBytes - at);
    check(cudaMemcpy(tensor + at, pattern.data(), bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
}

Memory allocate() {
  Memory m{};
  for (int set = 0; set < kSets; ++set) {
    for (char** tensor : {&m.x[set], &m.dy[set], &m.out[set]}) {
      check(cudaMalloc(tensor, kMostBytes), "cudaMalloc");
      fill(*tensor);
    }
  }
  const std::size_t statistics = 9 * kMostChannels * sizeof(float);
  check(cudaMalloc(&m.statistics, statistics), "cudaMalloc");
  check(cudaMemset(m.statistics, 0x3c, statistics), "cudaMemset");
  check(cudaMalloc(&m.control, kControlWords * sizeof(unsigned)), "cudaMalloc");
  check(cudaMemset(m.control, 0, kControlWords * sizeof(unsigned)), "cudaMemset");
  check(cudaMalloc(&m.partials, kPartialBytes), "cudaMalloc");
  return m;
}

cudaError_t launch(const Problem& p, const Plan& plan, Pass pass, const Memory& m, int set,
                   cudaStream_t stream) {
  float* rows = static_cast<float*>(m.statistics);
  brn::Workspace workspace;
  workspace.control = m.control;
  workspace.partials = m.partials;
  if (pass == Pass::kForward) {
    brn::ForwardParams params;
    params.x = m.x[set];
    params.y = m.out[set];
    params.stats = rows;
    params.running_mean = rows + 5 * p.channels;
    params.running_std = rows + 6 * p.channels;
    return static_cast<cudaError_t>(brn::launch_forward(p, plan, params, workspace, stream));
  }
  brn::BackwardParams params;
  params.dy = m.dy[set];
  params.x = m.x[set];
  params.dx = m.out[set];
  params.stats = rows;
  params.dweight = rows + 7 * p.channels;
  params.dbias = rows + 8 * p.channels;
  return static_cast<cudaError_t>(brn::launch_backward(p, plan, params, workspace, stream));
}

// Microseconds of one call, in a graph of kCalls on rotating tensors; negative if it cannot run.
double time_plan(const Problem& p, const Plan& plan, Pass pass, const Memory& m,
                 cudaStream_t stream) {
  if (brn::control_words(plan.teams) > kControlWords) return -1;
  if (brn::partials_bytes(p, plan) > kPartialBytes) return -1;
  const cudaError_t error = launch(p, plan, pass, m, 0, stream);
  if (error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorInvalidValue) {
    cudaGetLastError();
    return -1;
  }
  check(error, "launch");
  check(cudaStreamSynchronize(stream), "first run of a plan");

  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int call = 0; call < kCalls; ++call) {
    check(launch(p, plan, pass, m, call % kSets, stream), "captured launch");
  }
  check(cudaStreamEndCapture(stream, &graph), "end of capture");
  check(cudaGraphInstantiate(&replay, graph, 0), "cudaGraphInstantiate");

  std::vector<float> samples;
  for (int sample = 0; sample < kSamples + 1; ++sample) {
    const float ms = bench::milliseconds(
        stream, [&] { check(cudaGraphLaunch(replay, stream), "cudaGraphLaunch"); });
    if (sample > 0) samples.push_back(ms);
  }
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  std::nth_element(samples.begin(), samples.begin() + kSamples / 2, samples.end());
  return samples[kSamples / 2] * 1e3 / kCalls;
}

// Bytes per microsecond, read and written, of a copy far larger than the caches.
double copy_roof(const Memory& m, cudaStream_t stream) {
  double best = 0;
  for (int sample = 0; sample < kSamples; ++sample) {
    const float ms = bench::milliseconds(stream, [&] {
      check(cudaMemcpyAsync(m.out[0], m.x[0], kMostBytes, cudaMemcpyDeviceToDevice, stream),
            "copy");
    });
    best = std::max(best, 2.0 * kMostBytes / (ms * 1e3));
  }
  return best;
}

// Microseconds that the planner's model promises.
double modelled(const Problem& p, const Plan& plan, const Device& device, Pass pass) {
  return brn::estimate(brn::as_planned(p, plan), plan, device, pass);
}

// What lies side by side in a plan.
struct Width {
  int slot_bytes;
  int columns;
};

std::vector<Width> widths(const Problem& p) {
  const int widest = brn::widest_slot(p);
  std::vector<Width> widths{{widest, 1}};
  if (brn::can_bundle(p)) widths.push_back({16, static_cast<int>(p.spatial)});
  if (brn::can_unalign(p)) widths.push_back({16, 1});
  if (p.layout == Layout::kChannelsFirst) return widths;
  const int lanes = widest / brn::size_of(p.dtype);
  for (int columns = 2; columns <= brn::kWarp && columns * lanes <= brn::kMaxSlabChannels &&
                        std::int64_t{columns / 2} * lanes < p.channels;
       columns *= 2) {
    widths.push_back({widest, columns});
  }
  return widths;
}

std::vector<Plan> candidates(const Problem& p, const Device& device, Pass pass) {
  std::vector<Plan> plans{pass == Pass::kForward ? brn::plan_forward(p, device)
                                                 : brn::plan_backward(p, device)};
  const auto add = [&](Plan plan) {
    const Problem planned = brn::as_planned(p, plan);
    for (const bool shared : {false, true}) {
      plan.prefetch = shared;
      plan.retained = shared ? brn::most_retained(planned, device, plan, pass) : 0;
      const Plan whole = brn::cut(planned, device, pass, plan);
      if (std::find(plans.begin(), plans.end(), whole) == plans.end()) plans.push_back(whole);
    }
  };
  add(plans.front());
  for (const auto& [slot_bytes, columns] : widths(p)) {
    Plan plan;
    plan.slot_bytes = slot_bytes;
    plan.columns = columns;
    plan.slots = brn::slots_per_thread(pass, slot_bytes);
    plan.team = 1;
    const int fewest = std::max(columns, brn::slab_channels(p, plan));
    for (plan.threads = brn::kMinThreads; plan.threads <= brn::kMaxThreads; plan.threads *= 2) {
      if (plan.threads >= fewest) add(plan);
    }
    plan.threads = brn::kMaxThreads;
    const Problem planned = brn::as_planned(p, plan);
    const std::int64_t resident = brn::resident_blocks(planned, device.sm_count);
    const std::int64_t total = brn::positions(p, plan);
    const std::int64_t fills = brn::ceil_div(total, plan.positions_per_round());
    const std::int64_t retains =
        brn::ceil_div(fills, 1 + brn::most_retained(planned, device, plan, pass));
    for (const std::int64_t team :
         {std::int64_t{2}, std::int64_t{4}, std::int64_t{8}, std::int64_t{16}, resident / 16,
          resident / 12, resident / 8, resident / 6, resident / 4, resident / 3, resident / 2,
          resident, fills / 2, fills, fills * 2, retains}) {
      if (team < 2 || team > resident || team > brn::ceil_div(total, plan.positions_per_pass())) {
        continue;
      }
      plan.team = static_cast<int>(team);
      add(plan);
    }
  }
  return plans;
}

struct Timed {
  Plan plan;
  double us;
  bool chosen;
};

void sweep(const Problem& p, Pass pass, const Device& device, const Memory& m, double roof,
           cudaStream_t stream) {
  std::vector<Timed> found;
  bool chosen = true;  // the planner's own is the first
  for (const Plan& plan : candidates(p, device, pass)) {
    const double us = time_plan(p, plan, pass, m, stream);
    if (us > 0) found.push_back({plan, us, chosen});
    chosen = false;
  }
  std::sort(found.begin(), found.end(), [](const Timed& a, const Timed& b) { return a.us < b.us; });
  const double bytes = static_cast<double>(p.elements()) * brn::size_of(p.dtype);
  std::printf("\n%s %s %lldx%lldx%lld, %d-byte elements, %.1f MB, %zu plans\n",
              pass == Pass::kForward ? "forward" : "backward",
              p.layout == Layout::kChannelsFirst ? "nchw" : "nhwc", static_cast<long long>(p.batch),
              static_cast<long long>(p.channels), static_cast<long long>(p.spatial),
              brn::size_of(p.dtype), bytes / 1e6, found.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (i >= 5 && !found[i].chosen) continue;
    const double of_roof = brn::tensors_moved(pass) * bytes / found[i].us / roof;
    std::printf("%10.1f us %4.0f%%  model %8.1f  %c ", found[i].us, 100 * of_roof,
                modelled(p, found[i].plan, device, pass), found[i].chosen ? '*' : ' ');
    std::cout << found[i].plan << std::endl;
  }
}

// What a plan does with shared memory.
enum Use { kPrefetch, kRetention, kUses };
constexpr const char* kUseNames[] = {"prefetch", "retention"};

// The planner's plan with all that can be in shared memory, and its twin, which differs in nothing
// but that it leaves it idle; and the plan for a chip that has none, which may differ in more.
void compare_shared_memory(const Device& device, const Memory& m, cudaStream_t stream,
                           Clock::time_point end) {
  Device plain = device;
  plain.shared_bytes = 0;
  double log_gain[kUses][2] = {};  // of plans that the planner does not, and does, let have it
  int plans[kUses][2] = {};
  int skipped = 0;          // problems, at the end of the time
  int refused[kUses] = {};  // not all blocks resident at once, though the planner counts on it
  std::printf(
      "\nshared memory: us of the planner's plan with and without it, planned without it\n");
  constexpr int kMaps[][2] = {{64, 112}, {64, 56},   {256, 56}, {128, 28}, {512, 28},
                              {256, 14}, {1024, 14}, {512, 7},  {2048, 7}};
  for (const int batch : {32, 256}) {
    for (const auto& [channels, side] : kMaps) {
      for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
        for (const Layout layout : {Layout::kChannelsFirst, Layout::kChannelsLast}) {
          for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
            if (Clock::now() > end) {
              ++skipped;
              continue;
            }
            const Problem p{batch, channels, std::int64_t{side} * side, layout, dtype, 16};
            const auto planned = [&](const Device& d) {
              return pass == Pass::kForward ? brn::plan_forward(p, d) : brn::plan_backward(p, d);
            };
            Plan with = planned(device), without = with;
            const bool chosen = with.prefetch != 0 || with.retained != 0;
            with.prefetch = brn::can_prefetch(brn::as_planned(p, with), device, with);
            without.prefetch = without.retained = 0;
            if (with == without) continue;
            const Use use = with.prefetch ? kPrefetch : kRetention;
            const double on = time_plan(p, with, pass, m, stream);
            const double off = time_plan(p, without, pass, m, stream);
            const double other = time_plan(p, planned(plain), pass, m, stream);
            refused[use] += on <= 0 && off > 0;
            if (on <= 0 || off <= 0) continue;
            log_gain[use][chosen] += std::log(off / on);
            ++plans[use][chosen];
            std::printf(
                "%s %s %dx%dx%d %d-byte, %s: with %.1f (model %.1f)%s, without %.1f (%.1f), "
                "planned without %.1f (%.1f)\n",
                pass == Pass::kForward ? "forward " : "backward",
                layout == Layout::kChannelsFirst ? "nchw" : "nhwc", batch, channels, side,
                brn::size_of(dtype), kUseNames[use], on, modelled(p, with, device, pass),
                chosen ? " *" : "", off, modelled(p, without, device, pass), other,
                modelled(p, planned(plain), plain, pass));
          }
        }
      }
    }
  }
  if (skipped > 0) std::printf("out of time for %d problems\n", skipped);
  for (const Use use : {kPrefetch, kRetention}) {
    const char* name = kUseNames[use];
    for (const bool chosen : {true, false}) {
      if (plans[use][chosen] == 0) continue;
      std::printf("%s: %.3f times as fast, geometric mean of %d plans that the planner %s it\n",
                  name, std::exp(log_gain[use][chosen] / plans[use][chosen]), plans[use][chosen],
                  chosen ? "gives" : "does not give");
    }
    if (refused[use] > 0)
      std::printf("%s: %d plans did not fit with it, but without\n", name, refused[use]);
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // what is printed outlives a time limit
  const std::chrono::duration<double> budget(argc > 1 ? std::atof(argv[1]) : 60.0);
  const auto began = Clock::now();
  const auto after = [&](std::chrono::duration<double> time) {
    return began + std::chrono::duration_cast<Clock::duration>(time);
  };
  cudaDeviceProp chip{};
  check(cudaGetDeviceProperties(&chip, 0), "cudaGetDeviceProperties");
  const Device device{chip.multiProcessorCount, static_cast<double>(chip.l2CacheSize),
                      static_cast<int>(chip.sharedMemPerMultiprocessor),
                      10 * chip.major + chip.minor};
  const Memory memory = allocate();
  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  const double roof = copy_roof(memory, stream);
  std::printf("%s, %d SMs, copy %.0f GB/s; * is the planner's choice\n", chip.name, device.sm_count,
              roof / 1e3);
  compare_shared_memory(device, memory, stream, after(budget / 2));

  struct Shape {
    std::int64_t batch, channels, side;
  };
  // The six of kernels that differ most in regime first, so that a short budget still says much.
  for (const Shape s :
       {Shape{32, 64, 112}, Shape{256, 256, 56}, Shape{256, 2048, 7}, Shape{256, 256, 19},
        Shape{32, 512, 28}, Shape{256, 1024, 14}, Shape{256, 64, 112}, Shape{32, 256, 56},
        Shape{256, 512, 28}, Shape{32, 1024, 14}, Shape{32, 2048, 7}, Shape{32, 128, 28},
        Shape{32, 64, 56}, Shape{256, 256, 1}, Shape{1024, 512, 1}}) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
      for (const Layout layout : {Layout::kChannelsFirst, Layout::kChannelsLast}) {
        if (s.side == 1 && layout == Layout::kChannelsFirst) continue;
        for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
          if (Clock::now() > after(budget)) {
            std::printf("\nstopped after %.0f s\n", budget.count());
            return 0;
          }
          const Problem p{s.batch, s.channels, s.side * s.side, layout, dtype, 16};
          sweep(p, pass, device, memory, roof, stream);
        }
      }
    }
  }
  return 0;
}
