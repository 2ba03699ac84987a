// Sums across the lanes of several vectors at once, each of one channel: halves are added to
// halves, of two vectors in one, until lane k is the k-th vector's sum. That is a quarter of the
// shuffles of one vector after the other, and what comes after it is a vector, too.
#pragma once

#include "accumulate.h"
#include "lanes.h"

#include <utility>

namespace brn::cpu {
namespace {

// Vectors that go together: as many as a vector has Reals.
template <typename T>
constexpr int kTogetherAcross = BRN_VECTOR_BYTES / static_cast<int>(sizeof(RealOf<T>));

// Of each block of kBlock lanes, first of a and then of b, the half from kFrom on.
template <int kBlock, int kFrom, int... kPlaces>
constexpr auto half_places(std::integer_sequence<int, kPlaces...>) {
  constexpr int kHalf = kBlock / 2;
  constexpr int kCount = sizeof...(kPlaces);
  return std::integer_sequence<int, kPlaces / kHalf % 2 * kCount + kPlaces / kBlock * kBlock +
                                        kPlaces % kHalf + kFrom...>{};
}
template <int kBlock, bool kUpper, typename Real>
BRN_LANES Lanes<Real> halves(Lanes<Real> a, Lanes<Real> b) {
  constexpr auto places = std::make_integer_sequence<int, kLanes<Real>>{};
  return {{shuffle(a.v[0], b.v[0], half_places<kBlock, kUpper ? kBlock / 2 : 0>(places))}};
}

template <int kBlock, typename Real>
BRN_LANES Lanes<Real> folded(Lanes<Real> a, Lanes<Real> b) {
  return halves<kBlock, false>(a, b) + halves<kBlock, true>(a, b);
}
template <int kBlock, typename Real>
BRN_LANES ExactSum<Lanes<Real>> folded(ExactSum<Lanes<Real>> a, ExactSum<Lanes<Real>> b) {
  ExactSum<Lanes<Real>> total{halves<kBlock, false>(a.sum, b.sum),
                              folded<kBlock>(a.error, b.error)};
  total.add(halves<kBlock, true>(a.sum, b.sum));
  return total;
}

template <int kCount, typename Value>
BRN_LANES Value sums_across(const Value (&v)[kCount]) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    Value pairs[kCount / 2];
    for (int k = 0; k < kCount / 2; ++k) pairs[k] = folded<kCount>(v[k], v[k + kCount / 2]);
    return sums_across<kCount / 2>(pairs);
  }
}

// With what rounding leaves.
template <int kCount, typename Real>
BRN_LANES ExactSum<Lanes<Real>> exact_sums_across(const Lanes<Real> (&v)[kCount]) {
  ExactSum<Lanes<Real>> pairs[kCount / 2];
  for (int k = 0; k < kCount / 2; ++k) {
    const Lanes<Real> a = v[k];
    const Lanes<Real> b = v[k + kCount / 2];
    const TwoSum<Lanes<Real>> sum =
        two_sum(halves<kCount, false>(a, b), halves<kCount, true>(a, b));
    pairs[k] = {sum.sum, sum.error};
  }
  return sums_across<kCount / 2>(pairs);
}

// Of elements of 16 bits, those at even places and those at odd ones together.
template <typename T>
BRN_LANES Lanes<RealOf<T>> in_one_vector(Lanes<T> lanes) {
  if constexpr (Lanes<T>::kVectors == 1) {
    return {{lanes.v[0]}};
  } else {
    return {{lanes.v[0] + lanes.v[1]}};
  }
}

}  // namespace
}  // namespace brn::cpu
