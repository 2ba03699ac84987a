// Vectors of the width BRN_VECTOR_BYTES of the instruction set at hand, and how elements get in and
// out of them.
//
// Built on the compiler's vector types (GCC, Clang), whose operators work lane by lane. Everything
// is in an unnamed namespace, since each instruction set has its own copy of it.
#pragma once

#include "element.h"

#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "the first of two elements is the lower one");

#define BRN_INLINED __attribute__((always_inline))
#define BRN_LANES inline BRN_INLINED

namespace brn::cpu {
namespace {

template <typename Value, int kBytes = BRN_VECTOR_BYTES>
struct VectorOf {
  typedef Value Type __attribute__((vector_size(kBytes)));
};
template <typename Value>
using Vector = typename VectorOf<Value>::Type;
using Words = Vector<std::uint32_t>;
using HalfWords = Vector<std::uint16_t>;
using SignedWords = Vector<std::int32_t>;

template <typename To, typename From>
BRN_LANES To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename V>
BRN_LANES V load_vector(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <typename V>
BRN_LANES void store_vector(void* to, V v) {
  std::memcpy(to, &v, sizeof(v));
}

// Fetches a line, as a rule not into the L1, which has few places for lines on their way. GB/s of
// dy and x out of memory, sums of (32, 256, 14, 14) float32: 13 by way of the L1, 23 so.
template <bool kToWrite = false, bool kToL1 = false, typename T>
BRN_LANES void fetch(const T* line) {
  __builtin_prefetch(line, kToWrite, kToL1 ? 3 : 2);
}

template <typename T>
BRN_LANES void fetch_to(bool l1, const T* line) {
  l1 ? fetch<false, true>(line) : fetch(line);
}

// To an aligned address, past the caches. Not in order with other writes: see finish_streams().
template <typename V>
BRN_LANES void stream_vector(void* to, V v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, static_cast<V*>(to));
#elif defined(__x86_64__)
  const auto floats = bits_of<Vector<float>>(v);
#if BRN_VECTOR_BYTES == 64
  __builtin_ia32_movntps512(static_cast<float*>(to), floats);
#elif BRN_VECTOR_BYTES == 32
  __builtin_ia32_movntps256(static_cast<float*>(to), floats);
#else
  __builtin_ia32_movntps(static_cast<float*>(to), floats);
#endif
#else
  store_vector(to, v);
#endif
}

// Before another thread may look at what was streamed.
BRN_LANES void finish_streams() { std::atomic_thread_fence(std::memory_order_seq_cst); }

// One vector's bytes of elements T, as Reals. Of 16-bit elements, that is two vectors: the elements
// at even places and those at odd ones, which come out of a 32-bit word by a shift or a mask.
template <typename T>
struct Lanes {
  using Real = RealOf<T>;
  static constexpr int kVectors = sizeof(Real) / sizeof(T);
  Vector<Real> v[kVectors];

  // {{f(0), f(1)}}, without a loop: GCC copies an array that has been indexed by a variable through
  // the stack, by 16 bytes, and then waits to load them as a vector. Sums of (1, 16, 56, 56)
  // bfloat16 in the L2, Zen 3 with AVX2: 10.9 us with loops and 4.9 so.
  template <typename F>
  static BRN_LANES Lanes each(F f) {
    if constexpr (kVectors == 1) {
      return {{f(0)}};
    } else {
      return {{f(0), f(1)}};
    }
  }

  // All lanes x.
  static BRN_LANES Lanes of(Real x) {
    return each([&](int) BRN_INLINED {
      return x - Vector<Real>{};  // not +, which would make 0 of -0
    });
  }

  BRN_LANES Lanes& operator+=(Lanes b) { return *this = *this + b; }
  friend BRN_LANES Lanes operator+(Lanes a, Lanes b) {
    return each([&](int i) BRN_INLINED { return a.v[i] + b.v[i]; });
  }
  friend BRN_LANES Lanes operator-(Lanes a, Lanes b) {
    return each([&](int i) BRN_INLINED { return a.v[i] - b.v[i]; });
  }
  friend BRN_LANES Lanes operator*(Lanes a, Lanes b) {
    return each([&](int i) BRN_INLINED { return a.v[i] * b.v[i]; });
  }
  friend BRN_LANES Lanes operator/(Lanes a, Lanes b) {
    return each([&](int i) BRN_INLINED { return a.v[i] / b.v[i]; });
  }
  friend BRN_LANES Lanes operator*(Lanes a, Real b) {
    return each([&](int i) BRN_INLINED { return a.v[i] * b; });
  }
  friend BRN_LANES Lanes at_least_one(Lanes a) {
    return each([&](int i) BRN_INLINED { return a.v[i] < 1 ? Vector<Real>{} + 1 : a.v[i]; });
  }
};

template <typename T>
constexpr int kLanes = BRN_VECTOR_BYTES / static_cast<int>(sizeof(T));

// ---- elements

template <typename T>
BRN_LANES Lanes<T> load(const T* x) {
  return {{load_vector<Vector<T>>(x)}};
}
// A vector of elements.
template <typename T>
BRN_LANES auto packed(Lanes<T> lanes) {
  return lanes.v[0];
}

BRN_LANES Lanes<BFloat16> load(const BFloat16* x) {
  const Words words = load_vector<Words>(x);
  return {{bits_of<Vector<float>>(words << 16), bits_of<Vector<float>>(words & 0xffff0000u)}};
}

// The upper, and the lower, halves of the words of both, in turn.
#if BRN_VECTOR_BYTES == 32 && (defined(__clang__) || __GNUC__ >= 12)
// By a blend, which is one instruction with AVX2. Inference of (32, 512, 7, 7) on Zen 3, one
// thread, 244 us, and 258 as below.
BRN_LANES HalfWords blended(Words a, Words b) {
  return __builtin_shufflevector(bits_of<HalfWords>(a), bits_of<HalfWords>(b), 0, 17, 2, 19, 4, 21,
                                 6, 23, 8, 25, 10, 27, 12, 29, 14, 31);
}
BRN_LANES HalfWords upper_halves(Words even, Words odd) { return blended(even >> 16, odd); }
BRN_LANES HalfWords lower_halves(Words even, Words odd) { return blended(even, odd << 16); }
#else
BRN_LANES HalfWords upper_halves(Words even, Words odd) {
  return bits_of<HalfWords>((even >> 16) | (odd & 0xffff0000u));
}
BRN_LANES HalfWords lower_halves(Words even, Words odd) {
  return bits_of<HalfWords>((even & 0x0000ffffu) | (odd << 16));
}
#endif

// Rounded to nearest, ties to even, both elements of a word at once: the upper halves, and one more
// where the lower half is more than half of a last place, or just that above an odd one. A NaN has
// no bits in its lower half: x and dy bring none, and arrange() takes them from parameters. With
// vectors of 64 bytes a comparison makes a mask register, and the sum takes it as it is: forward of
// (4, 64, 112, 112), 508 us, and 544 by way of a vector of it, as the others have it anyway.
BRN_LANES Words packed(Lanes<BFloat16> lanes) {
  const Words even = bits_of<Words>(lanes.v[0]);
  const Words odd = bits_of<Words>(lanes.v[1]);
  const HalfWords upper = upper_halves(even, odd);
  const HalfWords lower = lower_halves(even, odd);
  const auto up = (lower | (upper & 1)) > 0x8000;
  if constexpr (BRN_VECTOR_BYTES == 64) return bits_of<Words>(up ? upper + 1 : upper);
  return bits_of<Words>(upper - bits_of<HalfWords>(up));
}

// From the upper half of each word. The exponent is rebased by a multiplication, which is exact and
// normalises subnormals; inf and NaN have come out finite then and get their exponent back.
BRN_LANES Vector<float> from_upper_half(Words words) {
  const Words bits = bits_of<Words>(bits_of<SignedWords>(words) >> 3) & 0x8fffe000u;
  const Words rebased = bits_of<Words>(bits_of<Vector<float>>(bits) * 0x1p112f);
  return bits_of<Vector<float>>((bits & 0x0f800000u) == 0x0f800000u ? bits | 0x7f800000u : rebased);
}

BRN_LANES Lanes<Half> load(const Half* x) {
  const Words words = load_vector<Words>(x);
  return {{from_upper_half(words << 16), from_upper_half(words)}};
}

// In the lower half of each word, rounded to nearest, ties to even. Subnormals are rounded by an
// addition that puts their last bit at the float's last.
BRN_LANES Words lower_half(Vector<float> v) {
  const Words bits = bits_of<Words>(v);
  const SignedWords magnitude = bits_of<SignedWords>(bits & 0x7fffffffu);
  const SignedWords finite =
      magnitude < 0x47800000 ? magnitude : SignedWords{} + 0x47800000;  // 65536 rounds to inf
  const SignedWords normal = (finite - (0x38000000 - 0x0fff) + ((finite >> 13) & 1)) >> 13;
  const SignedWords subnormal =
      bits_of<SignedWords>(bits_of<Vector<float>>(magnitude) + 0.5f) - 0x3f000000;
  const SignedWords rounded = magnitude < 0x38800000 ? subnormal : normal;
  return bits_of<Words>(v == v ? rounded : SignedWords{} + 0x7e00) | ((bits >> 16) & 0x8000u);
}

BRN_LANES Words packed(Lanes<Half> lanes) {
  return lower_half(lanes.v[0]) | (lower_half(lanes.v[1]) << 16);
}

template <typename T>
BRN_LANES void store(T* y, Lanes<T> lanes) {
  store_vector(y, packed(lanes));
}
template <typename T>
BRN_LANES void stream(T* y, Lanes<T> lanes) {
  stream_vector(y, packed(lanes));
}
// Whether vectors from y on, and from `stride` elements further on, are aligned.
template <typename T>
BRN_LANES bool is_aligned(const T* y, std::int64_t stride) {
  const auto bytes = static_cast<std::uintptr_t>(stride) * sizeof(T);
  return (reinterpret_cast<std::uintptr_t>(y) | bytes) % BRN_VECTOR_BYTES == 0;
}

BRN_LANES float to_real(float x) { return x; }
BRN_LANES double to_real(double x) { return x; }
BRN_LANES float to_real(BFloat16 x) { return bits_of<float>(std::uint32_t{x.bits} << 16); }
BRN_LANES float to_real(Half x) {
  return from_upper_half(Words{} + (std::uint32_t{x.bits} << 16))[0];
}

// The first `count` elements; the others are 0. For what is too short for a vector.
template <typename T>
BRN_LANES Lanes<T> load_first(const T* x, std::int64_t count) {
  T buffer[kLanes<T>] = {};
  for (std::int64_t k = 0; k < count; ++k) buffer[k] = x[k];
  return load(buffer);
}
template <typename T>
BRN_LANES void store_first(T* y, Lanes<T> lanes, std::int64_t count) {
  T buffer[kLanes<T>];
  store(buffer, lanes);
  for (std::int64_t k = 0; k < count; ++k) y[k] = buffer[k];
}

// ---- Reals, one for each element: parameters of neighbouring channels

template <typename V, int... kPlaces>
BRN_LANES V shuffle(V a, V b, std::integer_sequence<int, kPlaces...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, kPlaces...);
#else
  using Place = std::conditional_t<sizeof(a[0]) == 8, std::int64_t, std::int32_t>;
  return __builtin_shuffle(a, b, Vector<Place>{kPlaces...});
#endif
}
template <int... kPlaces>
constexpr auto even_places(std::integer_sequence<int, kPlaces...>) {
  return std::integer_sequence<int, 2 * kPlaces...>{};
}
template <int... kPlaces>
constexpr auto odd_places(std::integer_sequence<int, kPlaces...>) {
  return std::integer_sequence<int, 2 * kPlaces + 1 ...>{};
}
// Of the elements interleaved: a0 b0 a1 b1 ...; kFrom = 0 for the first half of them.
template <int kFrom, int... kPlaces>
constexpr auto interleaved_places(std::integer_sequence<int, kPlaces...>) {
  constexpr int kCount = sizeof...(kPlaces);
  return std::integer_sequence<int, kFrom + kPlaces / 2 + kPlaces % 2 * kCount...>{};
}

template <typename T>
BRN_LANES Lanes<T> load_reals(const RealOf<T>* p) {
  using V = Vector<RealOf<T>>;
  if constexpr (Lanes<T>::kVectors == 1) {
    return {{load_vector<V>(p)}};
  } else {
    constexpr int kCount = kLanes<T> / 2;
    constexpr auto places = std::make_integer_sequence<int, kCount>{};
    const V a = load_vector<V>(p);
    const V b = load_vector<V>(p + kCount);
    return {{shuffle(a, b, even_places(places)), shuffle(a, b, odd_places(places))}};
  }
}
template <typename T>
BRN_LANES void store_reals(RealOf<T>* p, Lanes<T> lanes) {
  if constexpr (Lanes<T>::kVectors == 1) {
    store_vector(p, lanes.v[0]);
  } else {
    constexpr int kCount = kLanes<T> / 2;
    constexpr auto places = std::make_integer_sequence<int, kCount>{};
    store_vector(p, shuffle(lanes.v[0], lanes.v[1], interleaved_places<0>(places)));
    store_vector(p + kCount,
                 shuffle(lanes.v[0], lanes.v[1], interleaved_places<kCount / 2>(places)));
  }
}

// The same in the order of lanes, vector after vector, which takes no shuffles.
template <typename T>
BRN_LANES Lanes<T> load_lanes(const RealOf<T>* p) {
  Lanes<T> lanes;
  for (auto& v : lanes.v) {
    v = load_vector<Vector<RealOf<T>>>(p);
    p += sizeof(v) / sizeof(*p);
  }
  return lanes;
}
template <typename T>
BRN_LANES void store_lanes(RealOf<T>* p, Lanes<T> lanes) {
  for (const auto& v : lanes.v) {
    store_vector(p, v);
    p += sizeof(v) / sizeof(*p);
  }
}

// Parameters in which a NaN has no bits in its lower half, as rounding to bfloat16 needs it.
BRN_LANES Vector<float> quiet_nans(Vector<float> v) {
  return v == v ? v : bits_of<Vector<float>>(Words{} + 0x7fc00000u);
}
template <typename T>
BRN_LANES Lanes<T> quiet(Lanes<T> lanes) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    for (Vector<float>& v : lanes.v) v = quiet_nans(v);
  }
  return lanes;
}

// ---- across lanes

template <typename Value, int kBytes>
BRN_LANES Value sum_across(typename VectorOf<Value, kBytes>::Type v) {
  if constexpr (kBytes == 2 * sizeof(Value)) {
    return v[0] + v[1];
  } else {
    using Halved = typename VectorOf<Value, kBytes / 2>::Type;
    Halved half[2];
    std::memcpy(half, &v, sizeof(v));
    return sum_across<Value, kBytes / 2>(half[0] + half[1]);
  }
}

template <typename T>
BRN_LANES RealOf<T> sum_across(Lanes<T> lanes) {
  Vector<RealOf<T>> v = lanes.v[0];
  for (int i = 1; i < Lanes<T>::kVectors; ++i) v += lanes.v[i];
  return sum_across<RealOf<T>, BRN_VECTOR_BYTES>(v);
}

// Where a run of elements ends within a vector.
template <typename T>
struct Mask {
  static constexpr int kVectors = Lanes<T>::kVectors;
  using Bits = Vector<std::conditional_t<sizeof(RealOf<T>) == 8, std::int64_t, std::int32_t>>;
  Bits v[kVectors];

  BRN_LANES Lanes<T> operator()(Lanes<T> lanes) const {
    return Lanes<T>::each([&](int i) BRN_INLINED {
      return bits_of<Vector<RealOf<T>>>(bits_of<Bits>(lanes.v[i]) & v[i]);
    });
  }
  // Those of a where it is -1, of b elsewhere.
  BRN_LANES Lanes<T> operator()(Lanes<T> a, Lanes<T> b) const {
    return Lanes<T>::each([&](int i) BRN_INLINED { return v[i] ? a.v[i] : b.v[i]; });
  }
};

// -1 for the last `count` of a vector's elements: at place `count` of as many zeros, then ones,
// then zeros.
template <typename T>
BRN_LANES Mask<T> mask_at(int place) {
  using Element =
      std::conditional_t<sizeof(T) == 8, std::int64_t,
                         std::conditional_t<sizeof(T) == 4, std::int32_t, std::int16_t>>;
  struct Table {
    Element elements[3 * kLanes<T>];
    constexpr Table() : elements() {
      for (int k = kLanes<T>; k < 2 * kLanes<T>; ++k) elements[k] = -1;
    }
  };
  static constexpr Table table;
  using Bits = typename Mask<T>::Bits;
  const Bits bits = load_vector<Bits>(table.elements + place);
  if constexpr (Mask<T>::kVectors == 1) {
    return {{bits}};
  } else {
    return {{bits_of<Bits>(bits_of<Words>(bits) << 16) >> 16, bits >> 16}};
  }
}
template <typename T>
BRN_LANES Mask<T> last_elements(std::int64_t count) {
  return mask_at<T>(static_cast<int>(count));
}
template <typename T>
BRN_LANES Mask<T> first_elements(std::int64_t count) {
  return mask_at<T>(2 * kLanes<T> - static_cast<int>(count));
}

}  // namespace
}  // namespace brn::cpu
