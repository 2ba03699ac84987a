// Vectors of the width BRN_VECTOR_BYTES of the instruction set at hand, and how elements get in and out of them.
//
// The compiler's vector types (GCC, Clang): operators work lane by lane, comparisons give masks. Everything is in an unnamed
// namespace, since each instruction set has its own copy of it.
#pragma once

#include "element.h"

#include <cstdint>
#include <cstring>

#define BRN_LANES inline __attribute__((always_inline))

namespace brn::cpu {
namespace {

template <typename Element, int kBytes>
struct VectorOf {
  typedef Element Type __attribute__((vector_size(kBytes)));
};
template <typename Real>
using Lanes = typename VectorOf<Real, BRN_VECTOR_BYTES>::Type;
using Words = VectorOf<std::uint32_t, BRN_VECTOR_BYTES>::Type;
using SignedWords = VectorOf<std::int32_t, BRN_VECTOR_BYTES>::Type;
using HalfWords = VectorOf<std::uint16_t, BRN_VECTOR_BYTES / 2>::Type;

template <typename Real>
constexpr int kLanes = BRN_VECTOR_BYTES / static_cast<int>(sizeof(Real));

template <typename To, typename From>
BRN_LANES To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename Real>
BRN_LANES Lanes<Real> broadcast(Real x) {
  return x - Lanes<Real>{};  // not +, which would turn -0 into 0
}

BRN_LANES Words broadcast_bits(std::uint32_t x) { return x + Words{}; }

BRN_LANES Words select(SignedWords mask, Words yes, Words no) { return (bits_of<Words>(mask) & yes) | (~bits_of<Words>(mask) & no); }

template <typename Vector, typename T>
BRN_LANES Vector load_unaligned(const T* from) {
  Vector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

BRN_LANES Lanes<float> load(const float* x) { return load_unaligned<Lanes<float>>(x); }
BRN_LANES Lanes<double> load(const double* x) { return load_unaligned<Lanes<double>>(x); }

BRN_LANES Words load_bits(const std::uint16_t* x) {
  return __builtin_convertvector(load_unaligned<HalfWords>(x), Words);
}

BRN_LANES Lanes<float> load(const BFloat16* x) { return bits_of<Lanes<float>>(load_bits(&x->bits) << 16); }

// The exponent is rebased by a multiplication, which is exact and also normalises subnormals. Above it lie inf and NaN.
BRN_LANES Lanes<float> load(const Half* x) {
  const Words half = load_bits(&x->bits);
  const Words magnitude = (half & 0x7fffu) << 13;
  const Lanes<float> rebased = bits_of<Lanes<float>>(magnitude) * 0x1p112f;
  const SignedWords special = bits_of<SignedWords>(magnitude) >= 0x0f800000;
  const Words bits = select(special, magnitude | 0x7f800000u, bits_of<Words>(rebased));
  return bits_of<Lanes<float>>(bits | ((half & 0x8000u) << 16));
}

BRN_LANES void store(float* y, Lanes<float> v) { std::memcpy(y, &v, sizeof(v)); }
BRN_LANES void store(double* y, Lanes<double> v) { std::memcpy(y, &v, sizeof(v)); }

BRN_LANES void store_bits(std::uint16_t* y, Words v) {
  const HalfWords narrow = __builtin_convertvector(v, HalfWords);
  std::memcpy(y, &narrow, sizeof(narrow));
}

// Round to nearest, ties to even; a NaN stays one.
BRN_LANES void store(BFloat16* y, Lanes<float> v) {
  const Words bits = bits_of<Words>(v);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const SignedWords nan = bits_of<SignedWords>(bits & 0x7fffffffu) > 0x7f800000;
  store_bits(&y->bits, select(nan, broadcast_bits(0x7fc0u), rounded));
}

// Round to nearest, ties to even. Subnormals are rounded by an addition that puts their last bit at the float's last.
BRN_LANES void store(Half* y, Lanes<float> v) {
  const Words bits = bits_of<Words>(v);
  const Words magnitude = bits & 0x7fffffffu;
  const SignedWords size = bits_of<SignedWords>(magnitude);
  const Words normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const Words subnormal = bits_of<Words>(bits_of<Lanes<float>>(magnitude) + 0.5f) - 0x3f000000u;
  Words half = select(size < 0x38800000, subnormal, normal);
  half = select(size >= 0x477ff000, broadcast_bits(0x7c00u), half);
  half = select(size > 0x7f800000, broadcast_bits(0x7e00u), half);
  store_bits(&y->bits, half | ((bits >> 16) & 0x8000u));
}

// The first `count` lanes; the others are 0. For what is too short for a vector.
template <typename T>
BRN_LANES Lanes<RealOf<T>> load_first(const T* x, std::int64_t count) {
  T lanes[kLanes<RealOf<T>>] = {};
  for (std::int64_t k = 0; k < count; ++k) lanes[k] = x[k];
  return load(lanes);
}

template <typename T>
BRN_LANES void store_first(T* y, Lanes<RealOf<T>> v, std::int64_t count) {
  T lanes[kLanes<RealOf<T>>];
  store(lanes, v);
  for (std::int64_t k = 0; k < count; ++k) y[k] = lanes[k];
}

}  // namespace
}  // namespace brn::cpu
