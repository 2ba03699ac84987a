// Values of neighbouring channels: copies, which cannot alias, so that the compiler makes vectors
// of the loops over them. In an unnamed namespace, since each instruction set has its own copy.
#pragma once

#include "../core/math.h"
#include "isa.h"

#include <cstdint>
#include <cstring>

namespace brn::cpu {
namespace {

constexpr std::int64_t kChunk = 32;

template <typename Real>
struct Chunk {
  static_assert(kChunk == 32, "copy() knows it");
  Real values[kChunk];

  Real& operator[](std::int64_t k) { return values[k]; }
  const Real& operator[](std::int64_t k) const { return values[k]; }

  // `count` of them from `from` on, or `otherwise` where that is null.
  static Chunk load(const Real* from, std::int64_t count, Real otherwise = Real(0)) {
    Chunk chunk;
    if (from != nullptr) {
      copy(from, count, chunk.values);
    } else {
      for (std::int64_t k = 0; k < count; ++k) chunk.values[k] = otherwise;
    }
    return chunk;
  }
  void store(Real* to, std::int64_t count) const { copy(values, count, to); }

 private:
  // A piece of known length becomes moves of vectors. A copy of unknown length GCC makes a "rep
  // movs", which takes longer to start than 32 channels take: with 10 to 15 of them a chunk, on Zen
  // 3, one thread, float32, forward and backward of (1, 2048, 7, 7) took 1.09 and 1.06 times as
  // long, of (1, 2048, 7, 7) bfloat16 in channels_last 1.11.
  template <int kCount>
  static void copy_piece(const Real*& from, Real*& to) {
    std::memcpy(to, from, kCount * sizeof(Real));
    from += kCount;
    to += kCount;
  }
  static void copy(const Real* from, std::int64_t count, Real* to) {
    if (count == kChunk) return copy_piece<kChunk>(from, to);
    if (count & 16) copy_piece<16>(from, to);
    if (count & 8) copy_piece<8>(from, to);
    if (count & 4) copy_piece<4>(from, to);
    if (count & 2) copy_piece<2>(from, to);
    if (count & 1) copy_piece<1>(from, to);
  }
};

// Calls f(first, count) for the chunks of [0, width).
template <typename F>
void for_each_chunk(std::int64_t width, F f) {
  for (std::int64_t w = 0; w < width; w += kChunk) {
    f(w, width - w < kChunk ? width - w : kChunk);
  }
}

// Columns of the [kStatRows][C] tensor.
template <typename Real>
struct StatsChunk {
  Chunk<Real> centre, residue, inv_std, r, d;

  ChannelStats<Real> operator[](std::int64_t k) const {
    return {centre[k], residue[k], inv_std[k], r[k], d[k]};
  }
  void set(std::int64_t k, ChannelStats<Real> s) {
    centre[k] = s.centre;
    residue[k] = s.residue;
    inv_std[k] = s.inv_std;
    r[k] = s.r;
    d[k] = s.d;
  }

  static StatsChunk load(const Real* from, std::int64_t channels, std::int64_t count) {
    return {Chunk<Real>::load(from, count), Chunk<Real>::load(from + channels, count),
            Chunk<Real>::load(from + 2 * channels, count),
            Chunk<Real>::load(from + 3 * channels, count),
            Chunk<Real>::load(from + 4 * channels, count)};
  }
  void store(Real* to, std::int64_t channels, std::int64_t count) const {
    centre.store(to, count);
    residue.store(to + channels, count);
    inv_std.store(to + 2 * channels, count);
    r.store(to + 3 * channels, count);
    d.store(to + 4 * channels, count);
  }

  // From channel c on, of a pass whose parameters these are: stats null, inference.
  template <typename Params>
  static StatsChunk of(const Params& params, std::int64_t channels, std::int64_t c,
                       std::int64_t count) {
    return params.stats != nullptr ? load(at<Real>(params.stats, c), channels, count)
                                   : of_running(at<Real>(params.running_mean, c),
                                                at<Real>(params.running_std, c), count);
  }

  // The moving statistics in their place: see inference_stats().
  static StatsChunk of_running(const Real* mean, const Real* std, std::int64_t count) {
    const Chunk<Real> means = Chunk<Real>::load(mean, count);
    const Chunk<Real> stds = Chunk<Real>::load(std, count);
    StatsChunk stats;
    for (std::int64_t k = 0; k < count; ++k) {
      stats.set(k, inference_stats<Real>({means[k], stds[k]}));
    }
    return stats;
  }
};

// What a channel's sums come to, in twice the precision of Real.
struct ExactSums {
  double g;
  double gx;
};

template <typename Real>
struct SumsChunk {
  Chunk<Real> g, g_error, gx, gx_error;  // gx: around the centre
  Chunk<Real> residue;                   // of the mean

  static SumsChunk load(const SumRows<Real>& rows, const Real* residue, std::int64_t w,
                        std::int64_t count) {
    return {Chunk<Real>::load(rows.g + w, count), Chunk<Real>::load(rows.g_error + w, count),
            Chunk<Real>::load(rows.gx + w, count), Chunk<Real>::load(rows.gx_error + w, count),
            Chunk<Real>::load(residue + w, count)};
  }

  // The error of an infinite sum is NaN.
  static double exact(Real sum, Real error) {
    return error == error ? static_cast<double>(sum) + static_cast<double>(error)
                          : static_cast<double>(sum);
  }
  ExactSums exact(std::int64_t k) const {
    const double sum_g = exact(g[k], g_error[k]);
    return {sum_g, exact(gx[k], gx_error[k]) - static_cast<double>(residue[k]) * sum_g};
  }
  Sums<Real> operator[](std::int64_t k) const {
    const ExactSums sums = exact(k);
    return {static_cast<Real>(sums.g), static_cast<Real>(sums.gx)};
  }
};

}  // namespace
}  // namespace brn::cpu
