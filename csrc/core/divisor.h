// Division by a number that the host knows: a multiplication and a shift, where a GPU takes some 20
// instructions for 32 bits and 100 for 64, one waiting for the other.
//
// Exact for dividends from 0 to 2^31 - 1. With l = ceil(log2 d) and m = ceil(2^(31+l) / d), which
// is below 2^32, m * d is 2^(31+l) + e with 0 <= e < d <= 2^l. So n * m / 2^(31+l) is n / d and at
// most n * e / (d * 2^(31+l)) < 1 / d more, which reaches no further integer. (T. Granlund,
// P. Montgomery: Division by invariant integers using multiplication, PLDI 1994.)
#pragma once

#include "host_device.h"

#include <cstdint>

namespace brn {

class Divisor {
 public:
  constexpr Divisor() = default;
  // At least 1. One above 2^31 gives 0 for every dividend, which is right.
  constexpr explicit Divisor(std::int64_t divisor) {
    if (divisor > std::int64_t{1} << 31) {
      multiplier_ = 0;
      return;
    }
    while (std::int64_t{1} << (shift_ - 31) < divisor) ++shift_;
    multiplier_ = static_cast<unsigned>(((std::int64_t{1} << shift_) + divisor - 1) / divisor);
  }

  BRN_HD constexpr unsigned quotient(unsigned dividend) const {
    return static_cast<unsigned>((std::uint64_t{dividend} * multiplier_) >> shift_);
  }

 private:
  unsigned multiplier_ = 1u << 31;
  int shift_ = 31;
};

// log2 of a power of two, to divide by it.
BRN_HD int bits_of(int power) {
#if defined(__CUDA_ARCH__)
  return 31 - __clz(power);
#else
  return 31 - __builtin_clz(static_cast<unsigned>(power));
#endif
}

}  // namespace brn
