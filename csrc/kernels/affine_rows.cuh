// The affine maps of a slab's channels in shared memory, field by field, so that a thread reads
// those of its channels by accesses of 16 bytes. As structs they would lie a multiple of 64 bytes
// apart for threads of neighbouring columns: with 16 columns of bfloat16 a warp would take 512
// turns at one bank to read them (SASS, sm_90: 32 LDS.32 a thread), and takes 64 so.
#pragma once

#include "../core/math.h"
#include "vector.cuh"

#include <cuda_runtime.h>

namespace brn {

template <typename Real, int kSlab>
class AffineRows {
 public:
  __device__ __forceinline__ void write(int channel, const Affine<Real>& affine) {
    pivot_[channel] = affine.pivot;
    offset_[channel] = affine.offset;
    scale_[channel] = affine.scale;
    shift_[channel] = affine.shift;
  }

  // Of kChannels channels from a multiple of kChannels on.
  template <int kChannels>
  __device__ __forceinline__ void read(int channel, Affine<Real> (&affine)[kChannels]) const {
    constexpr int kBytes = kChannels * static_cast<int>(sizeof(Real));
    using Wide = Slot<Real, (kBytes < 16 ? kBytes : 16)>;
#pragma unroll
    for (int k = 0; k < kChannels; k += Wide::kLanes) {
      Real pivot[Wide::kLanes];
      Real offset[Wide::kLanes];
      Real scale[Wide::kLanes];
      Real shift[Wide::kLanes];
      Wide::unpack(Wide::load_shared(pivot_ + channel + k), pivot);
      Wide::unpack(Wide::load_shared(offset_ + channel + k), offset);
      Wide::unpack(Wide::load_shared(scale_ + channel + k), scale);
      Wide::unpack(Wide::load_shared(shift_ + channel + k), shift);
#pragma unroll
      for (int i = 0; i < Wide::kLanes; ++i)
        affine[k + i] = {pivot[i], offset[i], scale[i], shift[i]};
    }
  }

 private:
  alignas(16) Real pivot_[kSlab];
  alignas(16) Real offset_[kSlab];
  alignas(16) Real scale_[kSlab];
  alignas(16) Real shift_[kSlab];
};

}  // namespace brn
