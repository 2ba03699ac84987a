// What is compiled once per instruction set and chosen when the process starts: the sweeps, and
// what is done once a channel between them.
//
// isa_baseline.cpp, isa_avx2.cpp and isa_avx512.cpp each compile sweeps.h for their instructions
// and return a table of it. Everything else is compiled once, for the baseline: cutting, threads,
// and merging what several ranks send (merge.cpp), which so gives the same bits in every process,
// whatever processors they run on.
#pragma once

#include "../core/math.h"
#include "../core/types.h"
#include "../kernels/launch.h"
#include "element.h"

#include <cstdint>

namespace brn::cpu {

// From so many planes a channel on, short planes are done in the order of memory (see
// plane_by_plane.h), and slabs leave room for what is fetched of the next one.
constexpr std::int64_t kManyPlanes = 8;

// A stretch [begin, end) of the positions of one slab; see slabs.h.
struct Part {
  Layout layout;
  std::int64_t channel;  // the slab's first
  std::int64_t width;    // channels of the slab
  std::int64_t first;    // element of its first channel at position 0
  std::int64_t plane;    // kChannelsFirst: positions that lie together, S
  std::int64_t stride;   // elements from plane to plane, or in kChannelsLast from row to row
  std::int64_t begin;
  std::int64_t end;
  std::int64_t within;       // kChannelsFirst: of its plane, where it begins
  std::int64_t offset;       // kChannelsFirst: elements from position 0 to where it begins
  std::int64_t next;         // kChannelsFirst: elements to the slab that is reduced next; 0: none
  std::int64_t ahead;        // elements from what is read in a row to what is fetched; see traits.h
  std::int64_t many_planes;  // kChannelsFirst: from which on the next slab is fetched (see runs.h)
  bool in_order;       // kChannelsFirst: parts are done in the order in which they lie in memory
  bool streamed;       // what is written goes past the caches: whole lines (see streams.h)
  bool to_l1;          // whether what is fetched goes to the L1: in kChannelsFirst short planes, in
                       // kChannelsLast what tiles and writes fetch
  bool fetch_written;  // kChannelsLast: whether lines that will be written are fetched
  bool eight_together;  // kChannelsLast: whether eight rows are written together, not four
};

// Parameters of `width` channels, as a struct of arrays.
template <typename Real>
using Affines = Affine<const Real*>;
template <typename Real>
using Projections = Projection<const Real*>;

// Sums of `width` channels, each in two Reals: sum + error is as good as one in twice the
// precision.
template <typename Real>
struct SumRows {
  Real* g;
  Real* g_error;
  Real* gx;
  Real* gx_error;
};

template <typename T>
struct Sweeps {
  using Real = RealOf<T>;
  // kChannelsLast: pivot[width], x of each channel at the slab's position 0, or the mean of the
  // first few.
  void (*pivots)(const Part&, const T* x, Real* pivot);
  // Makes parameters of `width` channels, in place, what sums, normalise and project take.
  void (*arrange)(const Part&, Real* parameters);
  // mean[width], m2[width] of x - pivot over the part. In kChannelsFirst the part that begins at
  // position 0 sets pivot[width].
  void (*moments)(const Part&, const T* x, Real* pivot, Real* mean, Real* m2);
  // Sums of dy and of dy * (x - centre) over the part.
  void (*sums)(const Part&, const T* dy, const T* x, const Real* centre, const SumRows<Real>&);
  // y = (x - centre) * scale + shift over the part.
  void (*normalise)(const Part&, const T* x, const Affines<Real>&, T* y);
  // dx = apply(projection, dy, x - centre) over the part.
  void (*project)(const Part&, const T* dy, const T* x, const Real* centre,
                  const Projections<Real>&, T* dx);
};

// Moments of x - pivot, of which the mean is in two Reals.
template <typename Real>
struct MomentRows {
  Real* mean;
  Real* mean_error;
  Real* m2;
};

// What a training step has beside its parameters.
template <typename Real>
struct Step {
  Limits<Real> limits;
  Real momentum;
  Real* moved_mean;  // [C] the moving averages after this batch; null: there are none
  Real* moved_std;
};

// What is done once a channel of a slab, on rows that begin with the slab's first channel. As
// compiled for the baseline, with AVX-512 to be had, forward and backward of (1, 2048, 7, 7) took
// 1.15 and 1.08 times as long in float32, 1.08 and 1.05 in bfloat16, and in kChannelsLast 1.13,
// 1.07, 1.24 and 1.15 (Emerald Rapids, one thread).
template <typename Real>
struct PerChannel {
  // Moments and sums of one more part into those of the parts before it.
  void (*merge_moments)(const Part& more, const MomentRows<Real>&, const MomentRows<Real>& total);
  void (*merge_sums)(const Part& more, const SumRows<Real>&, const SumRows<Real>& total);
  // Algorithm 1. False if a channel's moments are inf or NaN.
  bool (*step)(const Part& slab, const Problem&, const ForwardParams&, const Step<Real>&,
               const Real* pivot, const MomentRows<Real>&, const Affine<Real*>&);
  void (*affine)(const Part& slab, const Problem&, const InferenceParams&, const Affine<Real*>&);
  // Sums of dy * (x - centre); `residue` of the mean.
  void (*gradients)(const Part& slab, const Problem&, const BackwardParams&, const SumRows<Real>&,
                    const Real* residue, const Projection<Real*>&);
  void (*projection)(const Part& slab, const Problem&, const BackwardProjectParams&, Real* centre,
                     const Projection<Real*>&);
};

struct Isa {
  const char* name;
  std::int64_t short_plane_bytes;  // at the most: see plane_by_plane.h
  Sweeps<float> float32;
  Sweeps<double> float64;
  Sweeps<Half> float16;
  Sweeps<BFloat16> bfloat16;
  PerChannel<float> channels32;
  PerChannel<double> channels64;
};

// What the compiler may assume everywhere (SSE2 on x86-64, NEON on aarch64), and on x86-64 more:
// AVX2 with FMA, and AVX-512 F, BW, DQ and VL.
const Isa& isa_baseline();
const Isa& isa_avx2();
const Isa& isa_avx512();

// The best that this processor has, or what ATEN_CPU_CAPABILITY (default, avx2, avx512) says, as
// for Torch's own kernels.
const Isa& isa();

template <typename T>
const Sweeps<T>& sweeps();
template <>
inline const Sweeps<float>& sweeps<float>() {
  return isa().float32;
}
template <>
inline const Sweeps<double>& sweeps<double>() {
  return isa().float64;
}
template <>
inline const Sweeps<Half>& sweeps<Half>() {
  return isa().float16;
}
template <>
inline const Sweeps<BFloat16>& sweeps<BFloat16>() {
  return isa().bfloat16;
}

template <typename Real>
const PerChannel<Real>& per_channel();
template <>
inline const PerChannel<float>& per_channel<float>() {
  return isa().channels32;
}
template <>
inline const PerChannel<double>& per_channel<double>() {
  return isa().channels64;
}

}  // namespace brn::cpu
