// What the ranks of a synchronised step tell each other.
//
// A rank's message is 2 * C + 2 doubles: the mean of each channel, the sum of squared deviations of
// each channel, the number of values of a channel, and 1 if the rank will take part in the backward
// pass, else 0. Double, so that the mean arrives with all the digits of pivot + offset and the
// count of any batch is exact. A rank without examples says nothing but zeros.
#pragma once

#include "math.h"

#include <cstdint>

namespace brn {

BRN_HD constexpr std::int64_t message_length(std::int64_t channels) { return 2 * channels + 2; }

// The two sums over ranks of what is not a channel's.
struct Total {
  double count;     // values of a channel
  double backward;  // ranks that take part in the backward pass
};

BRN_HD Total total_of(const double* gathered, int ranks, std::int64_t channels) {
  Total total{0.0, 0.0};
  for (int rank = 0; rank < ranks; ++rank) {
    const double* message = gathered + rank * message_length(channels);
    total.count += message[2 * channels];
    total.backward += message[2 * channels + 1];
  }
  return total;
}

// Channel c of all ranks together, merged in their order, so that every rank gets the same bits. A
// rank without examples changes nothing.
template <typename Real>
BRN_HD PivotedMoments<Real> merge_ranks(const double* gathered, int ranks, std::int64_t channels,
                                        std::int64_t c) {
  Moments<double> all{0.0, 0.0, 0.0};
  for (int rank = 0; rank < ranks; ++rank) {
    const double* message = gathered + rank * message_length(channels);
    all = merge(all, Moments<double>{message[2 * channels], message[c], message[channels + c]});
  }
  const Real pivot = static_cast<Real>(all.mean);
  return {pivot,
          {static_cast<Real>(all.count), static_cast<Real>(all.mean - static_cast<double>(pivot)),
           static_cast<Real>(all.m2)}};
}

}  // namespace brn
