// Deterministic reductions over a block: which value meets which depends on the plan alone, never
// on timing.
//
// What is reduced is, for each of the thread's channels, a Moments (forward) or a Sums (backward).
// Threads whose index is equal modulo `columns` hold the same channels; where they do not, in
// bundles, see bundle.cuh.
#pragma once

#include "../core/divisor.h"
#include "../core/geometry.h"
#include "../core/math.h"

#include <cuda_runtime.h>

namespace brn {

constexpr unsigned kAllLanes = 0xffffffffu;

template <typename Real>
class RecordSums;
template <typename Real>
class AddedRecords;

// Moments of all channels of a thread. They share one count, so a merge divides once for all of
// them.
template <typename Real, int kChannels>
struct MomentsOf {
  using Record = Moments<Real>;
  using Records = RecordSums<Real>;
  using Total = ExactMoments<Real>;
  static constexpr int kSize = kChannels;
  Real count;
  Real mean[kChannels];
  Real m2[kChannels];

  __device__ __forceinline__ static MomentsOf empty() {
    MomentsOf m;
    m.count = Real(0);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) m.mean[k] = m.m2[k] = Real(0);
    return m;
  }
  __device__ __forceinline__ Record get(int k) const { return {count, mean[k], m2[k]}; }

  // As brn::merge, channel by channel.
  __device__ __forceinline__ void merge(const MomentsOf& other) {
    const Real total = count + other.count;
    const Real weight = total > Real(0) ? other.count / total : Real(0);
    const Real both = count * weight;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      const Real delta = other.mean[k] - mean[k];
      mean[k] += delta * weight;
      m2[k] += other.m2[k] + delta * delta * both;
    }
    count = total;
  }

  __device__ __forceinline__ MomentsOf from_lane_below(int distance) const {
    MomentsOf m;
    m.count = __shfl_down_sync(kAllLanes, count, distance);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      m.mean[k] = __shfl_down_sync(kAllLanes, mean[k], distance);
      m.m2[k] = __shfl_down_sync(kAllLanes, m2[k], distance);
    }
    return m;
  }
};

template <typename Real, int kChannels>
struct SumsOf {
  using Record = Sums<Real>;
  using Records = AddedRecords<Real>;
  using Total = Sums<Real>;
  static constexpr int kSize = kChannels;
  Real g[kChannels];
  Real gx[kChannels];

  __device__ __forceinline__ static SumsOf empty() {
    SumsOf s;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) s.g[k] = s.gx[k] = Real(0);
    return s;
  }
  __device__ __forceinline__ Record get(int k) const { return {g[k], gx[k]}; }

  __device__ __forceinline__ void merge(const SumsOf& other) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      g[k] += other.g[k];
      gx[k] += other.gx[k];
    }
  }

  __device__ __forceinline__ SumsOf from_lane_below(int distance) const {
    SumsOf s;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      s.g[k] = __shfl_down_sync(kAllLanes, g[k], distance);
      s.gx[k] = __shfl_down_sync(kAllLanes, gx[k], distance);
    }
    return s;
  }
};

// Moments of a channel's records, about the mean of the first of them, which is near those of all:
// merged one by one, each would round the mean once more, and divide: 34 instructions a record
// (SASS, sm_90), and 12 so. As in tile_moments(), what m2 loses by cancellation is bounded: by the
// number of a thread's records.
template <typename Real>
class RecordSums {
 public:
  __device__ __forceinline__ void add(const Moments<Real>& record) {
    add(record.count, record.mean, record.m2);
  }
  __device__ __forceinline__ void add(Real count, Real mean, Real m2) {
    if (count_ == Real(0)) centre_ = mean;
    const Real delta = mean - centre_;
    const Real moved = count * delta;
    count_ += count;
    sum_ += moved;
    squares_ += m2 + moved * delta;
  }

  __device__ __forceinline__ MomentsOf<Real, 1> all() const {
    MomentsOf<Real, 1> all = MomentsOf<Real, 1>::empty();
    if (count_ > Real(0)) {
      const Real further = sum_ / count_;
      const Real m2 = squares_ - sum_ * further;
      all.count = count_;
      all.mean[0] = centre_ + further;
      all.m2[0] = m2 < Real(0) ? Real(0) : m2;  // NaN stays
    }
    return all;
  }

 private:
  Real count_ = Real(0);
  Real centre_ = Real(0);
  Real sum_ = Real(0);
  Real squares_ = Real(0);
};

template <typename Real>
class AddedRecords {
 public:
  __device__ __forceinline__ void add(const Sums<Real>& record) {
    all_.g[0] += record.g;
    all_.gx[0] += record.gx;
  }
  __device__ __forceinline__ SumsOf<Real, 1> all() const { return all_; }

 private:
  SumsOf<Real, 1> all_ = SumsOf<Real, 1>::empty();
};

// Groups of threads that reduce by themselves first, at most.
constexpr int kMostGroups = kMaxThreads / kWarp;

// What `count` records come to together, `stride` apart. Unrolled, so that all are on their way
// from shared memory at once.
template <typename Real>
__device__ __forceinline__ Sums<Real> total_of(const Sums<Real>* records, int stride, int count) {
  Sums<Real> total = records[0];
#pragma unroll
  for (int g = 1; g < kMostGroups; ++g)
    if (g < count) total = merge(total, records[g * stride]);
  return total;
}

// About the first one's mean, which is near those of all: merged one by one, each merge would round
// the mean once more, and divide. dweight has the error of the mean times sum(dy). As in
// tile_moments(), what m2 loses by cancellation is bounded: by the number of records, 8 at most.
template <typename Real>
__device__ __forceinline__ ExactMoments<Real> total_of(const Moments<Real>* records, int stride,
                                                       int count) {
  const Real first = records[0].mean;
  Real values = records[0].count;
  Real sum = Real(0);
  Real squares = Real(0);
  Real m2 = records[0].m2;
#pragma unroll
  for (int g = 1; g < kMostGroups; ++g) {
    Moments<Real> m{};
    if (g < count) m = records[g * stride];
    const Real delta = g < count ? m.mean - first : Real(0);  // first may be infinite
    const Real moved = m.count * delta;
    values += m.count;
    sum += moved;
    squares += moved * delta;
    m2 += m.m2;
  }
  const Real further = values > Real(0) ? sum / values : Real(0);
  const Real between = squares - sum * further;
  const TwoSum<Real> mean = two_sum(first, further);
  return {{values, mean.sum, m2 + (between < Real(0) ? Real(0) : between)}, mean.error};
}

// Returns, in thread c < columns * kSize, what all threads together hold of the slab's channel c.
// Between two calls, and before `records` is used otherwise, the block has to meet at a barrier.
// `records` has one place a channel of the slab for each group of threads that reduces by itself
// first: a warp, or `columns` threads where those are more.
template <typename Values>
__device__ __forceinline__ typename Values::Total block_merge(Values values, int columns,
                                                              int threads,
                                                              typename Values::Record* records) {
  for (int distance = kWarp / 2; distance >= columns; distance /= 2)
    values.merge(values.from_lane_below(distance));

  const int thread = static_cast<int>(threadIdx.x);
  const int group_bits = bits_of(columns < kWarp ? kWarp : columns);
  const int group = thread >> group_bits;
  const int member = thread - (group << group_bits);
  const int channels = columns * Values::kSize;
  if (member < columns) {
#pragma unroll
    for (int k = 0; k < Values::kSize; ++k)
      records[group * channels + member * Values::kSize + k] = values.get(k);
  }
  __syncthreads();

  typename Values::Total total{};
  if (thread < channels) total = total_of(records + thread, channels, threads >> group_bits);
  return total;
}

}  // namespace brn
