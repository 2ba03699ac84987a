// The affine maps of a slab's channels in shared memory, field by field, so that a thread reads
// those of its channels by accesses of 16 bytes. As structs they would lie a multiple of 64 bytes
// apart for threads of neighbouring columns: with 16 columns of bfloat16 a warp would take 512
// turns at one bank to read them (SASS, sm_90: 32 LDS.32 a thread), and takes 64 so.
#pragma once

#include "../core/math.h"
#include "slab.cuh"
#include "vector.cuh"

#include <cuda_runtime.h>

namespace brn {

template <typename Real, int kSlab>
class AffineRows {
 public:
  __device__ __forceinline__ void write(int channel, const Affine<Real>& affine) {
    rows_[0][channel] = affine.centre;
    rows_[1][channel] = affine.scale;
    rows_[2][channel] = affine.shift;
  }

  template <int kChannels>
  __device__ __forceinline__ void read(const Owned<Layout::kBundles>& owned,
                                       Affine<Real> (&affine)[kChannels]) const {
    owned.each(affine,
               [this](int c) { return Affine<Real>{rows_[0][c], rows_[1][c], rows_[2][c]}; });
  }

  // Elsewhere kChannels of them from a multiple of kChannels on.
  template <Layout kLayout, int kChannels>
  __device__ __forceinline__ void read(const Owned<kLayout>& owned,
                                       Affine<Real> (&affine)[kChannels]) const {
    const int channel = owned.first;
    constexpr int kBytes = kChannels * static_cast<int>(sizeof(Real));
    using Wide = Slot<Real, (kBytes < 16 ? kBytes : 16)>;
#pragma unroll
    for (int k = 0; k < kChannels; k += Wide::kLanes) {
      Real centre[Wide::kLanes];
      Real scale[Wide::kLanes];
      Real shift[Wide::kLanes];
      Wide::unpack(Wide::load_shared(rows_[0] + channel + k), centre);
      Wide::unpack(Wide::load_shared(rows_[1] + channel + k), scale);
      Wide::unpack(Wide::load_shared(rows_[2] + channel + k), shift);
#pragma unroll
      for (int i = 0; i < Wide::kLanes; ++i) affine[k + i] = {centre[i], scale[i], shift[i]};
    }
  }

 private:
  alignas(16) Real rows_[3][kSlab];
};

}  // namespace brn
