// How blocks of one launch meet: the team barrier, the exchange of partial results, the ticket that
// finds the last block. Nothing here is ever reset by a memset or by the host: every launch leaves
// the control words ready for the next, all counts zero.
#pragma once

#include "../core/divisor.h"
#include "../core/geometry.h"
#include "../core/math.h"
#include "launch.h"
#include "registers.cuh"

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace brn {

__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
#if defined(__CUDACC__)
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
#else
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
#endif
}

// release: what this block wrote before is visible to whoever acquires the new value, or a later
// one that others made of it. Not acquire too: that would wait for the old value at once.
__device__ __forceinline__ unsigned add_release(unsigned* p, unsigned value) {
#if defined(__CUDACC__)
  unsigned old;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(p), "r"(value)
               : "memory");
  return old;
#else
  return atomicAdd(p, value);
#endif
}

// Waits until all `team` blocks have come, and has the block do something of its own meanwhile.
// Together they add exactly 2^31: bit 31 flips when the last one arrives, and the lower bits are
// zero again: the next use, of this launch or of any other, with a team of any size, starts from a
// clean count and waits for the next flip.
template <typename Meanwhile>
__device__ __forceinline__ void team_barrier(unsigned* line, int team, int rank,
                                             Meanwhile meanwhile) {
  constexpr unsigned kFlip = 0x80000000u;
  __syncthreads();
  unsigned old = 0;
  if (threadIdx.x == 0)
    old = add_release(line, rank == 0 ? kFlip - static_cast<unsigned>(team - 1) : 1u);
  meanwhile();
  if (threadIdx.x == 0) {
    while (((old ^ load_acquire(line)) & kFlip) == 0) __nanosleep(20);
  }
  __syncthreads();
}

struct Nothing {
  __device__ __forceinline__ void operator()() const {}
};

// The control words: see control_words().
__device__ __forceinline__ unsigned* ticket_word(const Workspace& w) { return w.control; }
__device__ __forceinline__ unsigned* nonfinite_word(const Workspace& w) { return w.control + 1; }
__device__ __forceinline__ unsigned* barrier_line(const Workspace& w, int team) {
  return w.control + kLineWords * (1 + team);
}

// What a block has done before it asks for its ticket: read what the last one overwrites, or
// written what the last one reads.
enum class Ticket { kHasRead, kHasWritten };

// How many blocks of the grid asked before, for is_last(). The count wraps to zero with the last.
// Called by one thread of each block, once, behind a block barrier that follows whatever the last
// block relies on.
//
// With kHasRead nothing waits: a release would, for all that the thread has under way, and an
// acquire for the answer, a way to L2 and back. Neither is needed. What was read has been used
// before the block barrier, so no later write can reach it, and the last block's write hangs on the
// answer.
template <Ticket kTicket>
__device__ __forceinline__ unsigned take_ticket(const Workspace& w) {
  int last = static_cast<int>(gridDim.x) - 1;
  compute_here(last);
#if defined(__CUDACC__)
  unsigned old;
  if constexpr (kTicket == Ticket::kHasRead) {
    asm volatile("atom.inc.relaxed.gpu.global.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(ticket_word(w)), "r"(last)
                 : "memory");
  } else {
    asm volatile("atom.inc.acq_rel.gpu.global.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(ticket_word(w)), "r"(last)
                 : "memory");
  }
  return old;
#else
  return atomicInc(ticket_word(w), static_cast<unsigned>(last));
#endif
}

__device__ __forceinline__ bool is_last(unsigned ticket) { return ticket + 1 == gridDim.x; }

template <typename Real>
using PairOf = std::conditional_t<std::is_same<Real, double>::value, double2, float2>;

// One set of partial results, [team][channels of the slab]. Two sets a team, used in turn: a fast
// block may already publish its part of the next slab while a slow one still reads this one.
template <typename Real>
class Partials {
 public:
  __device__ __forceinline__ Partials(const Workspace& w, const Plan& plan, int channels, int team,
                                      int parity)
      : pairs_(static_cast<Pair*>(w.partials) +
               std::int64_t{channels} * plan.team * (2 * std::int64_t{team} + parity)),
        channels_(channels) {}

  __device__ __forceinline__ void publish(int rank, int channel, Real first, Real second) const {
    Pair pair;
    pair.x = first;
    pair.y = second;
    pairs_[std::int64_t{rank} * channels_ + channel] = pair;
  }

  // What the first rank has published first of the channel that for_each() gives this thread.
  __device__ __forceinline__ Real first() const {
    return __ldcg(pairs_ + (threadIdx.x & static_cast<unsigned>(channels_ - 1))).x;
  }

  // Calls f(rank, first, second), in the order of ranks, for what this thread has to merge: of the
  // slab's channel threadIdx.x % channels, every (threads / channels)-th rank. From L2: the L1 may
  // hold what an earlier slab left there.
  template <int kAhead, typename F>
  __device__ __forceinline__ void for_each(const Plan& plan, F f) const {
    const int bits = bits_of(channels_);
    const int step = plan.threads >> bits;
    const Pair* pair = pairs_ + threadIdx.x;
    int rank = static_cast<int>(threadIdx.x) >> bits;
    compute_here(rank);
    for (; rank < plan.team; rank += kAhead * step, pair += kAhead * plan.threads) {
      Pair ahead[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (rank + k * step < plan.team) ahead[k] = __ldcg(pair + k * plan.threads);
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (rank + k * step < plan.team) f(rank + k * step, ahead[k].x, ahead[k].y);
    }
  }

 private:
  using Pair = PairOf<Real>;

  Pair* pairs_;
  int channels_;
};

}  // namespace brn
