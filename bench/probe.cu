// Properties of the chip that the planner's model takes for granted: what a copy reaches, how long
// a team barrier takes, up to what size a re-read comes out of the L2, what narrow pieces of a row
// cost, and on which SMs blocks land.
//
//   nvcc -O3 -std=c++17 -arch=native bench/probe.cu -o probe && ./probe
#include "../csrc/kernels/barrier.cuh"
#include "check.cuh"
#include "stopwatch.cuh"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <set>
#include <vector>

namespace {

using bench::check;

constexpr int kThreads = 256;

// Median microseconds of `run()`.
template <typename Run>
double microseconds(Run run) {
  std::vector<float> samples;
  for (int sample = 0; sample < 12; ++sample) {
    const float ms = bench::milliseconds(nullptr, run);
    if (sample >= 3) samples.push_back(ms);
  }
  std::nth_element(samples.begin(), samples.begin() + samples.size() / 2, samples.end());
  return samples[samples.size() / 2] * 1e3;
}

template <typename... Expected, typename... Actual>
void launch_together(void (*kernel)(Expected...), int blocks, int shared, Actual... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(shared);
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, args...), "cudaLaunchKernelEx");
}

// Which SM each block is on, while all of them are there.
__global__ void locate(int* sm) {
  if (threadIdx.x == 0) asm volatile("mov.u32 %0, %%smid;" : "=r"(sm[blockIdx.x]));
  bench::wait(50'000);
}

// The planner takes it that no SM gets a second block before all have one, and that neighbours,
// which make up a team, are apart.
void placement(const cudaDeviceProp& chip) {
  std::printf("\nSMs of the blocks of one cooperative launch\n");
  const int sms = chip.multiProcessorCount;
  int* sm = nullptr;
  check(cudaMalloc(&sm, 3 * sms * sizeof(int)), "cudaMalloc");
  for (const int per_sm : {2, 3}) {  // as in blocks_per_sm(), here by want of shared memory
    const int shared = static_cast<int>(chip.sharedMemPerMultiprocessor) / per_sm - 1024;
    check(cudaFuncSetAttribute(locate, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
          "cudaFuncSetAttribute");
    for (const int blocks : {sms / 2, sms, per_sm * sms}) {
      launch_together(locate, blocks, shared, sm);
      std::vector<int> on(blocks);
      check(cudaMemcpy(on.data(), sm, blocks * sizeof(int), cudaMemcpyDeviceToHost), "locate");
      const int first = std::min(blocks, sms);
      int pairs = 0;
      for (int block = 1; block < blocks; ++block) pairs += on[block] == on[block - 1];
      std::printf("  %d blocks, up to %d an SM: the first %d on %zu SMs; %d beside the next; ",
                  blocks, per_sm, first, std::set<int>(on.begin(), on.begin() + first).size(),
                  pairs);
      for (int block = 0; block < 8; ++block) std::printf("%d ", on[block]);
      std::printf("...\n");
    }
  }
  cudaFree(sm);
}

// Every team of `team` blocks meets `times` times.
__global__ void meet(unsigned* control, int team, int times) {
  brn::Workspace workspace;
  workspace.control = control;
  unsigned* line = brn::barrier_line(workspace, static_cast<int>(blockIdx.x) / team);
  const int rank = static_cast<int>(blockIdx.x) % team;
  for (int i = 0; i < times; ++i) brn::team_barrier(line, team, rank, brn::Nothing{});
}

void barriers(int sm_count) {
  unsigned* control = nullptr;
  const std::size_t bytes = brn::control_words(2 * sm_count) * sizeof(unsigned);
  check(cudaMalloc(&control, bytes), "cudaMalloc");
  check(cudaMemset(control, 0, bytes), "cudaMemset");
  std::printf("\nteam barrier, us each, all teams at once, %d blocks\n", 2 * sm_count);
  for (const int team : {2, 4, 8, 16, 33, 66, sm_count, 2 * sm_count}) {
    const int blocks = 2 * sm_count / team * team;
    constexpr int kFew = 100, kMany = 1100;
    const double few = microseconds([&] { launch_together(meet, blocks, 0, control, team, kFew); });
    const double many =
        microseconds([&] { launch_together(meet, blocks, 0, control, team, kMany); });
    std::printf("  team of %3d: %.2f\n", team, (many - few) / (kMany - kFew));
  }
  cudaFree(control);
}

// Reads [first, first + count) vectors; `sum` keeps the loads alive.
__global__ void read_forward(const float4* data, std::int64_t count, float* sum) {
  float total = 0;
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    const float4 v = data[i];
    total += v.x + v.y + v.z + v.w;
  }
  if (total == 12345.678f) *sum = total;
}

__global__ void read_backward(const float4* data, std::int64_t count, float* sum) {
  float total = 0;
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    const float4 v = data[count - 1 - i];
    total += v.x + v.y + v.z + v.w;
  }
  if (total == 12345.678f) *sum = total;
}

void rereads(const float4* data, float* sum, int sm_count) {
  std::printf("\nread of S bytes, then again from the end: GB/s of the second read\n");
  const int blocks = 8 * sm_count;
  for (const int megabytes : {5, 10, 15, 20, 25, 30, 35, 40, 50, 60, 80, 120}) {
    const std::int64_t count = megabytes * std::int64_t{1000000} / 16;
    const auto once = [&] { read_forward<<<blocks, kThreads>>>(data, count, sum); };
    const auto both = [&] {
      read_forward<<<blocks, kThreads>>>(data, count, sum);
      read_backward<<<blocks, kThreads>>>(data, count, sum);
    };
    // What was read before the sample is pushed out of the L2, or `once` would hit as well.
    const auto evict = [&] {
      read_forward<<<blocks, kThreads>>>(data + (256 << 16), std::int64_t{256} << 16, sum);
    };
    const double evicted = microseconds(evict);
    const double first = microseconds([&] { evict(), once(); }) - evicted;
    const double second = microseconds([&] { evict(), both(); }) - evicted - first;
    std::printf("  %3d MB: first %5.0f, second %5.0f\n", megabytes, megabytes * 1e3 / first,
                megabytes * 1e3 / second);
  }
}

// Every block reads a stripe of `width` vectors of the rows of a matrix of 2048-byte rows, as a
// slab of channels_last is read.
__global__ void read_stripes(const float4* data, std::int64_t rows, int width, float* sum) {
  constexpr int kRow = 2048 / 16;
  float total = 0;
  const int stripes = kRow / width, lane = static_cast<int>(threadIdx.x) % width;
  const int rows_at_once = static_cast<int>(blockDim.x) / width;
  const std::int64_t parts = gridDim.x / stripes, part = blockIdx.x / stripes;
  const std::int64_t share = (rows + parts - 1) / parts;
  const std::int64_t end = min(rows, (part + 1) * share);
  const float4* stripe = data + (blockIdx.x % stripes) * width + lane;
  for (std::int64_t row = part * share + threadIdx.x / width; row < end; row += rows_at_once) {
    const float4 v = stripe[row * kRow];
    total += v.x + v.y + v.z + v.w;
  }
  if (total == 12345.678f) *sum = total;
}

void stripes(const float4* data, float* sum, int sm_count) {
  std::printf("\nread of 1 GB in stripes of 2048-byte rows, one stripe a block: GB/s\n");
  constexpr std::int64_t kRows = 1000000000 / 2048;
  for (const int bytes : {32, 64, 128, 256, 512, 2048}) {
    const int width = bytes / 16, of_row = 2048 / bytes;
    const int blocks = std::max(1, 8 * sm_count / of_row) * of_row;
    const double us =
        microseconds([&] { read_stripes<<<blocks, kThreads>>>(data, kRows, width, sum); });
    std::printf("  %4d bytes: %.0f\n", bytes, kRows * 2048 / us / 1e3);
  }
}

void copies(const float4* data, float4* target) {
  std::printf("\ncopy, GB/s read and written\n");
  for (const int megabytes : {64, 128, 256, 512, 1000}) {
    const std::size_t bytes = megabytes * std::size_t{1000000};
    const double us = microseconds([&] {
      check(cudaMemcpyAsync(target, data, bytes, cudaMemcpyDeviceToDevice, nullptr), "copy");
    });
    std::printf("  %4d MB: %.0f\n", megabytes, 2.0 * static_cast<double>(bytes) / us / 1e3);
  }
}

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // what is printed outlives a time limit
  cudaDeviceProp chip{};
  check(cudaGetDeviceProperties(&chip, 0), "cudaGetDeviceProperties");
  std::printf("%s, %d SMs, L2 %.0f MB\n", chip.name, chip.multiProcessorCount,
              chip.l2CacheSize / 1e6);
  float4 *data = nullptr, *target = nullptr;
  float* sum = nullptr;
  constexpr std::size_t kBytes = std::size_t{1} << 30;
  check(cudaMalloc(&data, kBytes), "cudaMalloc");
  check(cudaMalloc(&target, kBytes), "cudaMalloc");
  check(cudaMalloc(&sum, sizeof(float)), "cudaMalloc");
  check(cudaMemset(data, 0x3c, kBytes), "cudaMemset");
  check(cudaMemset(target, 0, kBytes), "cudaMemset");
  copies(data, target);
  barriers(chip.multiProcessorCount);
  rereads(data, sum, chip.multiProcessorCount);
  stripes(data, sum, chip.multiProcessorCount);
  placement(chip);
  check(cudaDeviceSynchronize(), "the end");
  return 0;
}
