// Lane by lane: what the reductions keep, moments and sums, and the normalisation.
#pragma once

#include "../core/math.h"
#include "lanes.h"

#include <cstdint>

namespace brn::cpu {
namespace {

// merge() of math.h where the lanes of mean and m2 have one count between them.
template <typename Real, typename Value>
struct SharedMoments {
  Real count;
  Value mean;
  Value m2;
};
template <typename Real, typename Value>
BRN_LANES SharedMoments<Real, Value> merge(SharedMoments<Real, Value> a,
                                           SharedMoments<Real, Value> b) {
  const Real count = a.count + b.count;
  const Real weight = b.count / count;
  const Value delta = b.mean - a.mean;
  return {count, a.mean + delta * weight, a.m2 + b.m2 + delta * delta * (a.count * weight)};
}

template <typename T>
BRN_LANES Lanes<T> apply(const Affine<Lanes<T>>& a, Lanes<T> x) {
  return (x - a.centre) * a.scale + a.shift;
}

// Of values, and of their products with others.
template <typename T>
struct LaneSums {
  Lanes<T> values;
  Lanes<T> products;

  static BRN_LANES LaneSums of(Lanes<T> v, Lanes<T> w) { return {v, v * w}; }
  BRN_LANES LaneSums& operator+=(LaneSums b) {
    values += b.values;
    products += b.products;
    return *this;
  }
  friend BRN_LANES LaneSums operator+(LaneSums a, LaneSums b) { return a += b; }
};

// A sum and the rounding errors it has made (Knuth's two-sum): as good as one in twice the
// precision.
template <typename Value>
struct ExactSum {
  Value sum;
  Value error;

  BRN_LANES void add(Value v) {
    const Value next = sum + v;
    const Value added = next - sum;
    error += (sum - (next - added)) + (v - added);
    sum = next;
  }
};

template <int kCount, typename Value>
BRN_LANES Value sum_of(const Value (&v)[kCount]) {
  if constexpr (kCount == 2) {
    return v[0] + v[1];
  } else {
    Value halves[kCount / 2];
    for (int k = 0; k < kCount / 2; ++k) halves[k] = v[2 * k] + v[2 * k + 1];
    return sum_of<kCount / 2>(halves);
  }
}

// kCount vectors of dy and of x, `stride` elements apart.
template <int kCount, typename T>
BRN_LANES LaneSums<T> tile_sums(const T* dy, const T* x, std::int64_t stride, Lanes<T> centre) {
  if constexpr (kCount == 1) {
    return LaneSums<T>::of(load(dy), load(x) - centre);
  } else {
    constexpr int kHalf = kCount / 2;
    return tile_sums<kHalf>(dy, x, stride, centre) +
           tile_sums<kHalf>(dy + kHalf * stride, x + kHalf * stride, stride, centre);
  }
}

}  // namespace
}  // namespace brn::cpu
