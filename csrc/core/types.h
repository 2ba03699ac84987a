// Plain descriptions of a problem. No CUDA, no Torch: every other file may include this one.
#pragma once

#include "host_device.h"

#include <cstdint>

namespace brn {

enum class DType : std::uint8_t { kFloat32, kFloat16, kBFloat16, kFloat64 };

// kChannelsFirst is [N][C][S] (contiguous NCHW, NCDHW); kChannelsLast is [N*S][C] (NHWC, NDHWC, any
// 2-D input). kBundles and kUnaligned are how a plan may see kChannelsFirst: see core/plan.h.
enum class Layout : std::uint8_t { kChannelsFirst, kChannelsLast, kBundles, kUnaligned };

// Whether a slab is one channel.
BRN_HD constexpr bool by_channel(Layout layout) {
  return layout == Layout::kChannelsFirst || layout == Layout::kUnaligned;
}

struct Problem {
  std::int64_t batch = 0;     // N
  std::int64_t channels = 0;  // C
  std::int64_t spatial = 0;   // S: product of the spatial sizes, 1 for a 2-D input
  Layout layout = Layout::kChannelsFirst;
  DType dtype = DType::kFloat32;
  int alignment = 16;  // bytes; every tensor's first element is at a multiple of it

  BRN_HD constexpr std::int64_t reduced() const { return batch * spatial; }  // elements per channel
  BRN_HD constexpr std::int64_t elements() const { return batch * channels * spatial; }

  friend constexpr bool operator==(const Problem& a, const Problem& b) {
    return a.batch == b.batch && a.channels == b.channels && a.spatial == b.spatial &&
           a.layout == b.layout && a.dtype == b.dtype && a.alignment == b.alignment;
  }
};

// Bytes of one element of x, y, dy and dx.
constexpr int size_of(DType t) { return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2; }

// Bytes of one statistic, weight or bias: float32, and float64 for float64 tensors.
constexpr int size_of_statistic(DType t) { return t == DType::kFloat64 ? 8 : 4; }

BRN_HD constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace brn
