// The mean of a channel as the sweeps use it.
//
// Statistics hold a mean in two Reals, pivot + offset. Here it is in two others, of which the first
// alone is the mean rounded: x - mean = (x - centre) - residue, exactly, and the residue, half an
// ulp of the centre at most, goes into a term that is added anyway. An element so costs one
// subtraction and one parameter less than (x - pivot) - offset, and is as accurate.
#pragma once

#include "../core/math.h"

namespace brn::cpu {

template <typename Real>
struct Centre {
  Real centre;
  Real residue;
};

// Knuth's two-sum.
template <typename Real>
Centre<Real> centre_of(Real pivot, Real offset) {
  const Real centre = pivot + offset;
  const Real added = centre - pivot;
  return {centre, (pivot - (centre - added)) + (offset - added)};
}
template <typename Real>
Centre<Real> centre_of(ChannelStats<Real> s) {
  return centre_of(s.pivot, s.offset);
}

// y = (x - centre) * scale + shift
template <typename Real>
struct CentredAffine {
  Real centre;
  Real scale;
  Real shift;
};
template <typename Real>
CentredAffine<Real> centred(Affine<Real> a) {
  if (a.offset == Real(0)) return {a.pivot, a.scale, a.shift};
  const Centre<Real> c = centre_of(a.pivot, a.offset);
  return {c.centre, a.scale, a.shift - c.residue * a.scale};
}

// dx = (g - mean_g - (x - centre) * slope) * scale
template <typename Real>
Projection<Real> centred(Projection<Real> p, Centre<Real> c) {
  return {p.mean_g - c.residue * p.slope, p.slope, p.scale};
}

}  // namespace brn::cpu
