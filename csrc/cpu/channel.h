// Per-channel values behind the untyped pointers of launch.h.
#pragma once

#include "../core/math.h"

#include <cstdint>

namespace brn::cpu {

template <typename Real>
Real value_or(const void* values, std::int64_t c, Real otherwise) {
  return values != nullptr ? static_cast<const Real*>(values)[c] : otherwise;
}

template <typename Real>
Running<Real> load_running(const void* mean, const void* std, std::int64_t c) {
  return {static_cast<const Real*>(mean)[c], static_cast<const Real*>(std)[c]};
}

template <typename Real>
ChannelStats<Real> load_stats(const void* stats, std::int64_t channels, std::int64_t c) {
  const Real* s = static_cast<const Real*>(stats) + c;
  return {s[0], s[channels], s[2 * channels], s[3 * channels], s[4 * channels]};
}

template <typename Real>
void store_stats(void* stats, std::int64_t channels, std::int64_t c, ChannelStats<Real> v) {
  Real* s = static_cast<Real*>(stats) + c;
  s[0] = v.pivot;
  s[channels] = v.offset;
  s[2 * channels] = v.inv_std;
  s[3 * channels] = v.r;
  s[4 * channels] = v.d;
}

}  // namespace brn::cpu
