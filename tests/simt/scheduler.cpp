// Runs grids on the CPU. A CUDA thread is a fiber, a resident block an OS thread that runs its
// fibers one at a time.
//
// A fiber runs until it waits: for its block (barrier), its warp (shuffle) or another block
// (spin_pause). The block then picks another of its fibers; when all wait for other blocks, the
// next block has its turn. If nobody can go on, that is an error with the list of who waits where,
// never a hang.
#include "scheduler.h"

#include "fiber.h"

#include "include/cuda_runtime.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

__thread simt::Index threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr unsigned kMaxThreads = 1024;
constexpr std::size_t kPage = 4096;
#if defined(SIMT_ASAN)
constexpr std::size_t kStack = 256 * 1024;
#else
constexpr std::size_t kStack = 64 * 1024;
#endif

enum State { kReady, kAtBarrier, kInExchange, kSpinning, kExited, kStates };

struct Thread {
  Fiber fiber;
  State state = kReady;
  unsigned index = 0;
  unsigned exchanges =
      0;  // its parity picks the slot: a fast lane may publish again before a slow one has read
  Site site = {"", 0};  // where it waits, and in what
  Operation operation = Operation::kSyncWarp;
};

struct Warp {
  std::uint64_t slot[2][kWarp];
  int in[kStates];  // threads in each state
  int lane_order[kWarp];
};

class Launch;

struct Block {
  Launch* launch = nullptr;
  int resident = 0;
  unsigned index = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<int> warp_order;
  int in[kStates] = {};
  Fiber scheduler;
  Thread* current = nullptr;
  bool preempted = false;
  bool moved = false;  // did more than poll since it last waited for others
  std::mt19937 random;

  bool chance(unsigned one_in) { return random() % one_in == 0; }
  Warp& warp_of(const Thread& t) { return warps[t.index / kWarp]; }
  void enter(Thread& t, State state) {
    Warp& w = warp_of(t);
    --in[t.state], --w.in[t.state];
    ++in[state], ++w.in[state];
    t.state = state;
  }
};

__thread Block* block;

std::string at(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash != nullptr ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

const char* name(Operation operation) {
  switch (operation) {
    case Operation::kShuffleXor:
      return "__shfl_xor_sync";
    case Operation::kShuffleDown:
      return "__shfl_down_sync";
    case Operation::kShuffle:
      return "__shfl_sync";
    case Operation::kSyncWarp:
      return "__syncwarp";
  }
  return "";
}

std::string whereabouts(const Thread& t) {
  switch (t.state) {
    case kAtBarrier:
      return "at __syncthreads, " + at(t.site);
    case kInExchange:
      return std::string("in ") + name(t.operation) + ", " + at(t.site);
    case kSpinning:
      return "waiting for another block, " + at(t.site);
    case kExited:
      return "done";
    default:
      return "running";
  }
}

// "block 3: threads 0-31 at __syncthreads, reduce.cuh:120; threads 32-255 done"
std::string describe(const Block& b) {
  std::string text = "block " + std::to_string(b.index) + ":";
  int parts = 0;
  for (std::size_t i = 0; i < b.threads.size();) {
    std::size_t end = i + 1;
    const std::string where = whereabouts(b.threads[i]);
    while (end < b.threads.size() && whereabouts(b.threads[end]) == where) ++end;
    if (++parts > 4) return text + " ...";
    text += (parts > 1 ? "; " : " ") + std::string(end == i + 1 ? "thread " : "threads ") +
            std::to_string(i);
    if (end > i + 1) text += "-" + std::to_string(end - 1);
    text += " " + where;
    i = end;
  }
  return text;
}

struct Settings {
  Chip chip;
  Order order = Order::kAscending;
  unsigned seed = 0;
  unsigned first_block = 0;
  unsigned block_count = 0;  // 0: all
};

// One launch: which blocks are still to run, whose turn it is, and whether anybody can still go on.
class Launch {
 public:
  Launch(const Settings& settings, unsigned blocks, unsigned threads, int residents,
         void (*body)(void*), void* arguments)
      : settings(settings),
        blocks(blocks),
        threads(threads),
        body(body),
        arguments(arguments),
        residents_(residents) {
    block_order_.resize(blocks);
    for (unsigned k = 0; k < blocks; ++k) block_order_[k] = k;
    if (settings.order == Order::kDescending)
      std::reverse(block_order_.begin(), block_order_.end());
    random_.seed(settings.seed * 7919u + 1);
    if (random()) std::shuffle(block_order_.begin(), block_order_.end(), random_);
    turn_ = settings.order == Order::kRandom ? static_cast<int>(random_() % residents_.size()) : 0;
  }

  bool serial() const { return settings.order != Order::kParallel; }
  bool random() const {
    return settings.order == Order::kRandom || settings.order == Order::kParallel;
  }
  bool failed() const { return failed_.load(std::memory_order_relaxed); }
  const std::string& error() const { return error_; }

  bool next_block(unsigned& index) {
    const unsigned ticket = ticket_++;
    if (ticket < blocks) index = block_order_[ticket];
    return ticket < blocks && !failed();
  }

  void begin(int me) {
    std::unique_lock<std::mutex> lock(mutex_);
    wait_for_turn(me, lock);
  }

  // Another block may run before this one goes on.
  void step_aside(int me) {
    std::unique_lock<std::mutex> lock(mutex_);
    residents_[me].polls = 0;
    pass_turn(me);
    wait_for_turn(me, lock);
  }

  // Nothing of this block can go on until another block has done something. False if no other ever
  // will. `moved`: this block has done more than poll since its last call, so what the others wait
  // for may be there now.
  bool wait_for_others(int me, bool moved) {
    std::unique_lock<std::mutex> lock(mutex_);
    Resident& self = residents_[me];
    if (moved) ++epoch_;
    if (self.epoch != epoch_) self.polls = 0;
    self.epoch = epoch_;
    ++self.polls;
    if (std::all_of(residents_.begin(), residents_.end(), [this](const Resident& r) {
          return !r.alive || (r.epoch == epoch_ && r.polls >= 8);
        })) {
      return false;
    }
    if (serial()) {
      pass_turn(me);
      wait_for_turn(me, lock);
    } else {
      const bool patient = self.polls > 32;
      lock.unlock();
      if (patient)
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      else
        std::this_thread::yield();
    }
    return true;
  }

  void end(int me) {
    std::unique_lock<std::mutex> lock(mutex_);
    residents_[me].alive = false;
    ++epoch_;
    pass_turn(me);
  }

  void fail(const std::string& what) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!failed()) error_ = what;
    failed_ = true;
    for (Resident& r : residents_) r.wake.notify_one();
  }

  // For the other blocks of a deadlock.
  void add_to_error(const std::string& what) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (error_.size() < 1000) error_ += "\n  " + what;
  }

  const Settings settings;
  const unsigned blocks;
  const unsigned threads;
  void (*const body)(void*);
  void* const arguments;

 private:
  struct Resident {
    bool alive = true;
    std::uint64_t epoch = 0;  // up to which it has looked at what the others did
    int polls = 0;            // in vain, since then
    std::condition_variable wake;
  };

  void wait_for_turn(int me, std::unique_lock<std::mutex>& lock) {
    if (!serial()) return;
    residents_[me].wake.wait(lock, [&] { return turn_ == me || failed(); });
  }

  void pass_turn(int me) {
    if (!serial()) return;
    const int count = static_cast<int>(residents_.size());
    int step = 1;
    if (random()) {
      // Mostly to a block that can go on; a random one now and then.
      step += static_cast<int>(random_() % count);
      if (random_() % 4 != 0) {
        for (int k = 0; k < count; ++k) {
          const Resident& r = residents_[(me + step + k) % count];
          if (!r.alive || (r.epoch == epoch_ && r.polls > 0)) continue;
          step += k;
          break;
        }
      }
    }
    for (int k = 0; k < count; ++k) {
      const int candidate = (me + step + k) % count;
      if (!residents_[candidate].alive) continue;
      turn_ = candidate;
      residents_[candidate].wake.notify_one();
      return;
    }
  }

  std::mutex mutex_;
  std::vector<Resident> residents_;
  std::vector<unsigned> block_order_;
  std::atomic<unsigned> ticket_{0};
  std::atomic<bool> failed_{false};
  std::string error_;
  std::mt19937 random_;
  std::uint64_t epoch_ = 0;  // counts what blocks did before they had to wait
  int turn_ = 0;
};

// ---- inside a block ----

void enter_kernel() {
  fiber_entered(block->scheduler);
  block->launch->body(block->launch->arguments);
  Thread& self = *block->current;
  block->enter(self, kExited);
  switch_fiber(self.fiber, block->scheduler, true);
  std::abort();
}

void wait(State state, Site site) {
  Thread& self = *block->current;
  self.site = site;
  block->enter(self, state);
  switch_fiber(self.fiber, block->scheduler);
}

bool same_place(const Thread& a, const Thread& b) {
  return a.site.line == b.site.line && a.operation == b.operation &&
         std::strcmp(a.site.file, b.site.file) == 0;
}

// All threads that are left are at the barrier, and at the same one.
bool release_barrier(Block& b) {
  const int threads = static_cast<int>(b.threads.size());
  if (b.in[kAtBarrier] == 0 || b.in[kAtBarrier] + b.in[kExited] != threads) return false;
  const Thread* first = nullptr;
  for (Thread& t : b.threads) {
    if (t.state != kAtBarrier) continue;
    if (first == nullptr) first = &t;
    if (!same_place(*first, t)) {
      b.launch->fail("divergent barrier in " + describe(b));
      return false;
    }
  }
  for (Thread& t : b.threads) {
    if (t.state == kAtBarrier) b.enter(t, kReady);
  }
  return true;
}

// Scope is the warp, never the block: `if (warp == 0) reduce()` is a normal second half of a
// reduction.
bool release_exchange(Block& b, Warp& w) {
  if (w.in[kInExchange] == 0) return false;
  Thread* lanes = &b.threads[(&w - b.warps.data()) * kWarp];
  if (w.in[kInExchange] + w.in[kExited] != kWarp) return false;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (lanes[lane].state == kExited || !same_place(lanes[0], lanes[lane])) {
      b.launch->fail("a shuffle without part of its warp in " + describe(b));
      return false;
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) b.enter(lanes[lane], kReady);
  return true;
}

// Runs the threads of a warp until each waits, through at most `exchanges` shuffles.
void run_warp(Block& b, int warp, int exchanges) {
  Launch& launch = *b.launch;
  Warp& w = b.warps[warp];
  while (w.in[kReady] > 0 && exchanges > 0) {
    for (const int lane : w.lane_order) {
      Thread& t = b.threads[warp * kWarp + lane];
      if (t.state != kReady) continue;
      b.current = &t;
      threadIdx.x = t.index;
      switch_fiber(b.scheduler, t.fiber);
      b.moved = b.moved || t.state != kSpinning;
      if (b.preempted) {
        b.preempted = false;
        launch.step_aside(b.resident);
      }
      if (launch.failed()) return;
    }
    if (release_exchange(b, w)) --exchanges;
  }
}

void choose_order(Block& b) {
  const Order order = b.launch->settings.order;
  for (std::size_t k = 0; k < b.warps.size(); ++k) b.warp_order[k] = static_cast<int>(k);
  if (order == Order::kDescending) std::reverse(b.warp_order.begin(), b.warp_order.end());
  for (Warp& w : b.warps) {
    for (int lane = 0; lane < kWarp; ++lane) w.lane_order[lane] = lane;
    if (order == Order::kDescending) std::reverse(w.lane_order, w.lane_order + kWarp);
    if (b.launch->random()) std::shuffle(w.lane_order, w.lane_order + kWarp, b.random);
  }
}

void run_block(Block& b) {
  Launch& launch = *b.launch;
  choose_order(b);
  while (b.in[kExited] != static_cast<int>(b.threads.size())) {
    if (launch.random()) std::shuffle(b.warp_order.begin(), b.warp_order.end(), b.random);
    for (const int warp : b.warp_order) {
      const int exchanges =
          launch.random() && !b.chance(4) ? 1 + static_cast<int>(b.random() % 4) : 1 << 30;
      run_warp(b, warp, exchanges);
      if (launch.failed()) return;
    }
    if (release_barrier(b)) {
      if (launch.settings.order == Order::kRandom && b.chance(4)) launch.step_aside(b.resident);
      continue;
    }
    if (launch.failed()) return;
    if (b.in[kReady] > 0 || b.in[kExited] == static_cast<int>(b.threads.size())) continue;
    if (b.in[kSpinning] == 0) {
      launch.fail("deadlock in " + describe(b));
      return;
    }
    const bool moved = b.moved;
    b.moved = false;
    if (!launch.wait_for_others(b.resident, moved)) {
      launch.fail("deadlock, no block can go on:\n  " + describe(b));
      return;
    }
    if (launch.failed()) {
      launch.add_to_error(describe(b));
      return;
    }
    for (Thread& t : b.threads) {
      if (t.state == kSpinning) b.enter(t, kReady);
    }
  }
}

// Fills this OS thread's __shared__ variables with 0xff: NaN, or -1. They are the thread-local
// variables of this library, so the scheduler's own must be set afterwards.
void poison_shared_memory() {
  struct Search {
    std::uintptr_t here;
    void* data;
    std::size_t size;
  } search = {reinterpret_cast<std::uintptr_t>(&poison_shared_memory), nullptr, 0};
  threadIdx.x =
      0;  // the dynamic linker allocates a library's thread-local storage when it is first touched
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* out) {
        Search& s = *static_cast<Search*>(out);
        std::size_t size = 0;
        bool mine = false;
        for (int k = 0; k < info->dlpi_phnum; ++k) {
          const auto& header = info->dlpi_phdr[k];
          const std::uintptr_t begin = info->dlpi_addr + header.p_vaddr;
          if (header.p_type == PT_LOAD)
            mine = mine || (s.here >= begin && s.here - begin < header.p_memsz);
          if (header.p_type == PT_TLS) size = header.p_memsz;
        }
        if (!mine) return 0;
        s.data = info->dlpi_tls_data;
        s.size = size;
        return 1;
      },
      &search);
  if (search.data != nullptr) std::memset(search.data, 0xff, search.size);
}

// An OS thread that stands for a resident block, with the stacks of its fibers. Kept from launch to
// launch.
class Worker {
 public:
  explicit Worker(std::function<void()> done)
      : done_(std::move(done)), thread_([this] { loop(); }) {
    thread_.detach();  // the pool lives as long as the process
  }

  void start(Launch& launch, int resident) {
    std::unique_lock<std::mutex> lock(mutex_);
    launch_ = &launch;
    resident_ = resident;
    wake_.notify_one();
  }

 private:
  void loop() {
    for (;;) {
      Launch* launch;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return launch_ != nullptr; });
        launch = launch_;
        launch_ = nullptr;
      }
      launch->begin(resident_);
      for (unsigned index; launch->next_block(index);) run(*launch, index);
      launch->end(resident_);
      done_();
    }
  }

  void run(Launch& launch, unsigned index) {
    const unsigned threads = launch.threads;
    reserve_stacks(threads);
    poison_shared_memory();
    b_.launch = &launch;
    b_.resident = resident_;
    b_.index = index;
    b_.preempted = false;
    b_.moved = true;
    b_.random.seed(launch.settings.seed * 104729u + index);
    b_.threads.resize(threads);
    b_.warps.resize(threads / kWarp);
    b_.warp_order.resize(threads / kWarp);
    std::fill(b_.in, b_.in + kStates, 0);
    b_.in[kReady] = static_cast<int>(threads);
    for (Warp& w : b_.warps) {
      std::memset(w.slot, 0xff, sizeof w.slot);
      std::fill(w.in, w.in + kStates, 0);
      w.in[kReady] = kWarp;
    }
    for (unsigned i = 0; i < threads; ++i) {
      Thread& t = b_.threads[i];
      t.state = kReady;
      t.index = i;
      t.exchanges = 0;
      t.operation = Operation::kSyncWarp;
      // Stacks that all began at the same offset in a page would share a few lines of the L1 cache.
      const std::size_t colour = i * 13 % 61 * 64;
      make_fiber(t.fiber, stacks_ + i * kStack + kPage, kStack - kPage - colour, enter_kernel);
    }
    block = &b_;
    blockIdx.x = index;
    blockDim.x = threads;
    gridDim.x = launch.blocks;
    run_block(b_);
    if (launch.failed()) forget_stack(stacks_, threads * kStack);
  }

  void reserve_stacks(unsigned threads) {
    if (threads <= stack_count_) return;
    if (stacks_ != nullptr) munmap(stacks_, stack_count_ * kStack);
    void* memory = mmap(nullptr, threads * kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stacks_ = static_cast<char*>(memory);
    stack_count_ = threads;
    for (unsigned i = 0; i < threads; ++i)
      mprotect(stacks_ + i * kStack, kPage, PROT_NONE);  // overflow faults
  }

  std::function<void()> done_;
  std::mutex mutex_;
  std::condition_variable wake_;
  Launch* launch_ = nullptr;
  int resident_ = 0;
  Block b_;
  char* stacks_ = nullptr;
  unsigned stack_count_ = 0;
  std::thread thread_;  // last: it uses the others
};

class Pool {
 public:
  void run(Launch& launch, int residents) {
    while (workers_.size() < static_cast<std::size_t>(residents)) {
      workers_.push_back(std::make_unique<Worker>([this] {
        std::unique_lock<std::mutex> lock(mutex_);
        --busy_;
        idle_.notify_one();
      }));
    }
    std::unique_lock<std::mutex> lock(mutex_);
    busy_ = residents;
    for (int k = 0; k < residents; ++k) workers_[k]->start(launch, k);
    idle_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable idle_;
  int busy_ = 0;
  std::vector<std::unique_ptr<Worker>> workers_;
};

std::mutex launching;  // one grid at a time, as on one stream
Settings settings;
std::string error;

}  // namespace

void configure(Chip chip, Order order, unsigned seed) { settings = {chip, order, seed}; }

const char* last_error() { return error.c_str(); }

int lane() { return static_cast<int>(block->current->index % kWarp); }

std::uint64_t exchange(Site site, Operation operation, unsigned mask, std::uint64_t value,
                       int source) {
  if (mask != kAllLanes) fail(site, std::string(name(operation)) + " of a part of the warp");
  Thread& self = *block->current;
  Warp& warp = block->warp_of(self);
  const unsigned parity = self.exchanges++ & 1u;
  const unsigned lane = self.index % kWarp;
  warp.slot[parity][lane] = value;
  self.operation = operation;
  wait(kInExchange, site);
  return warp.slot[parity][source >= 0 && source < kWarp ? static_cast<unsigned>(source) : lane];
}

void sync_block(Site site) {
  block->current->operation = Operation::kSyncWarp;
  wait(kAtBarrier, site);
}

void spin_pause(Site site) {
  if (site.line != block->current->site.line) block->moved = true;  // another loop than before
  wait(kSpinning, site);
}

void may_be_preempted() {
  Block& b = *block;
  if (b.launch->settings.order != Order::kRandom || b.chance(2)) return;
  b.preempted = true;
  switch_fiber(b.current->fiber, b.scheduler);
}

void fail(Site site, const std::string& what) {
  const Thread& self = *block->current;
  block->launch->fail(what + ", " + at(site) + ", in block " + std::to_string(block->index) +
                      ", thread " + std::to_string(self.index));
  switch_fiber(block->current->fiber, block->scheduler);
  std::abort();
}

int run_grid(unsigned blocks, unsigned threads, bool cooperative, void (*body)(void*),
             void* arguments) {
  std::unique_lock<std::mutex> lock(launching);
  error.clear();
  if (blocks == 0 || blocks > 0x7fffffffu || threads == 0 || threads > kMaxThreads ||
      threads % kWarp != 0) {
    error = "invalid configuration: " + std::to_string(blocks) + " blocks of " +
            std::to_string(threads) + " threads";
    return cudaErrorInvalidConfiguration;
  }
  const unsigned capacity =
      static_cast<unsigned>(settings.chip.sm_count * settings.chip.blocks_per_sm);
  unsigned residents = blocks;
  if (cooperative) {
    if (blocks > capacity) {
      error = "cooperative launch of " + std::to_string(blocks) + " blocks where " +
              std::to_string(capacity) + " fit";
      return cudaErrorCooperativeLaunchTooLarge;
    }
  } else {
    // An ordinary launch promises nothing about who runs beside whom: one block at a time has to
    // do, a few have to.
    const bool random = settings.order == Order::kRandom || settings.order == Order::kParallel;
    residents = std::min(blocks, random ? std::min(capacity, 4u) : 1u);
  }
  static Pool* pool = new Pool;  // never destroyed: its threads sleep in it at exit
  Launch launch(settings, blocks, threads, static_cast<int>(residents), body, arguments);
  pool->run(launch, static_cast<int>(residents));
  error = launch.error();
  return launch.failed() ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace simt
