// A block: its threads as fibers, and which of them runs next.
#pragma once

#include "fiber.h"
#include "launch.h"
#include "scheduler.h"

#include <cstdint>
#include <random>
#include <string>
#include <vector>

namespace simt {

constexpr int kWarp = 32;

enum State { kReady, kAtBarrier, kInExchange, kSpinning, kExited, kStates };

// A copy under way, and what its source held when it was issued.
struct PendingCopy {
  Copy copy;
  unsigned char source[16];
};

struct Thread {
  Fiber fiber;
  State state = kReady;
  unsigned index = 0;
  unsigned exchanges = 0;  // its parity picks the slot: see Warp
  Site site = {"", 0};     // where it waits, and in what
  Operation operation = Operation::kSyncWarp;
  unsigned barriers = 0;  // its parity picks the mark
  std::vector<PendingCopy> copies;
};

struct Warp {
  // Two: a fast lane may publish for the next shuffle before a slow one has read of this one.
  std::uint64_t slot[2][kWarp];
  int in[kStates];  // threads in each state
  int lane_order[kWarp];
  char mark[2];  // of __syncwarp, which orders memory as shuffles do not
};

class Block {
 public:
  // Thread i has the `stack_size` bytes from stacks + i * stride on, the block
  // launch.dynamic_shared bytes of shared memory.
  void prepare(Launch& launch, int resident, unsigned index, char* stacks, std::size_t stride,
               std::size_t stack_size, void* dynamic_shared);
  void run();  // until all threads have exited or the launch has failed

  // For the running thread.
  void enter_kernel();
  void sync(Site site);
  void wait(State state, Site site, Operation operation);
  std::uint64_t exchange(Site site, Operation operation, unsigned mask, std::uint64_t value,
                         int source);
  void may_be_preempted();
  void* dynamic_shared(Site site, std::size_t offset, std::size_t size);
  void issue_copy(Site site, const Copy& copy);
  bool next_landing(Site site, Copy& copy);
  [[noreturn]] void fail(Site site, const std::string& what);
  int lane() const { return static_cast<int>(current_->index % kWarp); }

  // "block 3: threads 0-31 at __syncthreads, reduce.cuh:120; threads 32-255 done"
  std::string describe() const;

 private:
  bool chance(unsigned one_in) { return random_() % one_in == 0; }
  Warp& warp_of(const Thread& t) { return warps_[t.index / kWarp]; }
  void move_to(Thread& t, State state);
  void choose_order();
  void run_threads();
  void run_warp(int warp, int exchanges);
  bool release_barrier();
  bool release_exchange(int warp);

  Launch* launch_ = nullptr;
  int resident_ = 0;
  unsigned index_ = 0;
  void* dynamic_shared_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<int> warp_order_;
  int in_[kStates] = {};
  Fiber scheduler_;
  Thread* current_ = nullptr;
  char mark_[2] = {};
  bool preempted_ = false;
  bool moved_ = false;  // did more than poll since it last waited for others
  std::mt19937 random_;
};

// The block of this OS thread.
extern __thread Block* block;

}  // namespace simt
