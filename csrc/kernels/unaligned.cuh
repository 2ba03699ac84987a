// What a tile's slots come to where the first and the last of a plane are partly a neighbour's:
// those lanes hold numbers of another channel, NaN perhaps, and are selected away before anything
// is added.
#pragma once

#include "../core/geometry.h"
#include "reduce.cuh"
#include "slab.cuh"
#include "vector.cuh"

#include <cuda_runtime.h>

namespace brn {

// The lanes of a thread's slots that count, slot after slot; of one that does not exist none.
template <typename Slot>
class CoveredLanes {
 public:
  __device__ __forceinline__ CoveredLanes(int slots, const Cursor& cursor,
                                          const Walk<Layout::kUnaligned, Slot>& walk,
                                          const Cover<Slot, Layout::kUnaligned>& cover)
      : slots_(slots), plane_left_(cursor.plane_left), walk_(walk), cover_(cover) {}

  __device__ __forceinline__ unsigned next() {
    const unsigned lanes = slots_-- > 0 ? cover_.lanes(plane_left_) : 0u;
    walk_.advance(plane_left_);
    return lanes;
  }

 private:
  int slots_;
  int plane_left_;
  const Walk<Layout::kUnaligned, Slot>& walk_;
  const Cover<Slot, Layout::kUnaligned>& cover_;
};

// As tile_moments(), about the mean of the first slot, or of the second if nothing of that counts;
// if nothing of either does, nothing of any does. For lanes that do not count stands the first or
// the last of the slot, one of which does, so the centre is a mean of the tile's own elements, and
// sum(delta)^2 / count at most their number times m2. The pivot must not stand there: if it is far
// from the mean, every thread that begins at the end of a plane loses digits, 454 last places of
// 1 / std in all (float16, (1024, 8, 13, 13), one image's first values 333 and all else 0), and
// narrow slots lose 2.5.
template <typename Slot, int kSlots, typename Real>
__device__ __forceinline__ MomentsOf<Real, 1> unaligned_moments(typename Slot::Bits (&tile)[kSlots],
                                                                CoveredLanes<Slot> covered,
                                                                Real pivot) {
  CoveredLanes<Slot> again = covered;
  unsigned first = again.next();
  const bool empty = first == 0u;
  if (empty) first = again.next();
  Real x[Slot::kLanes];
  Slot::unpack(chosen(!empty, tile[0], tile[1]), x);
  const Real own = first & 1u ? x[0] : x[Slot::kLanes - 1];
#pragma unroll
  for (int i = 0; i < Slot::kLanes; ++i) x[i] = first >> i & 1 ? x[i] : own;
#pragma unroll
  for (int width = Slot::kLanes / 2; width >= 1; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  }
  const Real centre = x[0] * (Real(1) / Real(Slot::kLanes));

  Real sum = Real(0);
  Real squares = Real(0);
  int count = 0;
#pragma unroll
  for (int v = 0; v < kSlots; ++v) {
    const unsigned lanes = covered.next();
    keep_packed(tile[v]);
    Slot::unpack(tile[v], x);
#pragma unroll
    for (int i = 0; i < Slot::kLanes; ++i) {
      const Real delta = lanes >> i & 1 ? x[i] - centre : Real(0);
      sum += delta;
      squares += delta * delta;
    }
    count += __popc(lanes);
  }

  MomentsOf<Real, 1> moments = MomentsOf<Real, 1>::empty();
  if (count > 0) {
    moments.count = static_cast<Real>(count);
    const Real mean = sum / moments.count;
    const Real m2 = squares - sum * mean;
    moments.mean[0] = (centre - pivot) + mean;
    moments.m2[0] = m2 < Real(0) ? Real(0) : m2;  // NaN stays
  }
  return moments;
}

// As tile_sums().
template <typename Slot, int kSlots, typename Real>
__device__ __forceinline__ SumsOf<Real, 1> unaligned_sums(typename Slot::Bits (&x_tile)[kSlots],
                                                          typename Slot::Bits (&dy_tile)[kSlots],
                                                          CoveredLanes<Slot> covered, Real centre) {
  SumsOf<Real, 1> sums = SumsOf<Real, 1>::empty();
#pragma unroll
  for (int v = 0; v < kSlots; ++v) {
    const unsigned lanes = covered.next();
    keep_packed(x_tile[v]);
    keep_packed(dy_tile[v]);
    Real x[Slot::kLanes];
    Real dy[Slot::kLanes];
    Slot::unpack(x_tile[v], x);
    Slot::unpack(dy_tile[v], dy);
    SumsOf<Real, 1> slot = SumsOf<Real, 1>::empty();
#pragma unroll
    for (int i = 0; i < Slot::kLanes; ++i) {
      const bool counts = lanes >> i & 1;
      slot.g[0] += counts ? dy[i] : Real(0);
      slot.gx[0] += counts ? dy[i] * (x[i] - centre) : Real(0);
    }
    sums.merge(slot);
  }
  return sums;
}

}  // namespace brn
