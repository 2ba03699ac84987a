// Element types of x, y, dy and dx. Half and BFloat16 are only their bits here; lanes.h converts
// them.
#pragma once

#include "../core/types.h"

#include <cstdint>

namespace brn::cpu {

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

// Real, the type of arithmetic and statistics: double for double, float for the others.
template <typename T>
struct RealOfElement {
  using Type = float;
};
template <>
struct RealOfElement<double> {
  using Type = double;
};
template <typename T>
using RealOf = typename RealOfElement<T>::Type;

// Calls f with a value of the element type. The only switch over dtypes.
template <typename F>
void with_element(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kFloat64: return f(double{});
    case DType::kFloat16: return f(Half{});
    case DType::kBFloat16: return f(BFloat16{});
  }
}

// Where the values of channel c lie, behind the untyped pointers of launch.h; null stays null.
template <typename Real>
BRN_HD const Real* at(const void* values, std::int64_t c) {
  return values != nullptr ? static_cast<const Real*>(values) + c : nullptr;
}
template <typename Real>
BRN_HD Real* at(void* values, std::int64_t c) {
  return values != nullptr ? static_cast<Real*>(values) + c : nullptr;
}

}  // namespace brn::cpu
