// What the stand-in CUDA headers need of the scheduler, and what a test may ask of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace simt {

// In which order things happen that a GPU leaves open. Every order but kParallel is reproducible:
// one block runs at a time.
enum class Order {
  kAscending,  // blocks, warps and lanes by index; a warp runs as far as it can before the next one
               // starts
  kDescending,  // the other way round
  kRandom,  // from the seed: blocks are preempted at barriers and atomics, warps at shuffles, lanes
            // are shuffled
  kParallel,  // resident blocks truly run at the same time; inside a block as kRandom
};

struct Chip {
  int sm_count = 4;
  int blocks_per_sm = 2;  // what a cooperative launch may count on
};

void configure(Chip chip, Order order, unsigned seed);

// Launches run only `count` of their blocks, from `first` on: a test of what lies at the end of a
// tensor that is too large to run as a whole. count 0: all.
void select_blocks(unsigned first, unsigned count);

// Why the last launch on this OS thread failed; empty if it did not.
const char* last_error();

// Bytes of dynamic shared memory that a block of the last launch had.
std::size_t last_dynamic_shared();

// Where in the source a thread stands.
struct Site {
  const char* file;
  int line;
};

enum class Operation { kBarrier, kShuffleXor, kShuffleDown, kShuffle, kSyncWarp, kPause };

// Publishes `value` and returns what lane `source` published in the same exchange; every lane of
// the warp takes part.
std::uint64_t exchange(Site site, Operation operation, unsigned mask, std::uint64_t value,
                       int source);
int lane();

void sync_block(Site site);
void spin_pause(Site site);  // what a thread calls while it waits for another block

void may_be_preempted();  // by another block
struct AtomicPoint {
  AtomicPoint() { may_be_preempted(); }
  ~AtomicPoint() { may_be_preempted(); }
};

// Ends the launch with an error. Does not return to the kernel.
[[noreturn]] void fail(Site site, const std::string& what);

inline void check_access(Site site, const void* p, std::size_t alignment) {
  if (reinterpret_cast<std::uintptr_t>(p) % alignment != 0) fail(site, "misaligned access");
}

// Where these bytes of the block's dynamic shared memory are. It has to have them.
void* dynamic_shared(std::size_t offset, std::size_t size, const char* file = __builtin_FILE(),
                     int line = __builtin_LINE());

// An asynchronous copy into it, of `size` bytes, is recorded when it is issued and lands when the
// thread that issued it waits: what lies between sees neither the old bytes there nor the new ones.
// The caller moves the bytes, so that a sanitizer sees whose accesses they are.
struct Copy {
  void* to;
  const void* from;
  std::size_t size;
};
void issue_copy(Site site, const Copy& copy);
bool next_landing(Site site, Copy& copy);  // false: none is left to land

// Lets a kernel have this much dynamic shared memory, from now on.
void allow_dynamic_shared(const void* kernel, std::size_t bytes);
std::size_t dynamic_shared_allowed(const void* kernel);

// Runs body(arguments) once for each thread of the grid. A cudaError_t.
int run_grid(unsigned blocks, unsigned threads, std::size_t dynamic_shared, bool cooperative,
             void (*body)(void*), void* arguments);

}  // namespace simt
