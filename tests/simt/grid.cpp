// Runs grids on the CPU. A CUDA thread is a fiber, a resident block an OS thread that runs its
// fibers one at a time.
//
// A fiber runs until it waits: for its block (barrier), its warp (shuffle) or another block
// (spin_pause). The block then picks another of its fibers; when all wait for other blocks, the
// next block has its turn. If nobody can go on, that is an error with the list of who waits where,
// never a hang.
#include "block.h"
#include "fiber.h"
#include "launch.h"
#include "scheduler.h"

#include "include/cuda_runtime.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace simt {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr std::size_t kPage = 4096;
constexpr int kGuardedResidents = 32;
constexpr std::size_t kShared = 128;  // alignment of dynamic shared memory
#if defined(SIMT_ASAN)
constexpr std::size_t kStack = 256 * 1024;
#else
constexpr std::size_t kStack = 64 * 1024;
#endif

// Fills this OS thread's __shared__ variables with 0xff: NaN, or -1. They are the thread-local
// variables of this library, so the scheduler's own must be set afterwards.
void poison_shared_memory() {
  struct Search {
    std::uintptr_t here;
    void* data;
    std::size_t size;
  } search = {reinterpret_cast<std::uintptr_t>(&poison_shared_memory), nullptr, 0};
  // The dynamic linker allocates a library's thread-local storage when it is first touched.
  threadIdx.x = 0;
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
        launch = std::exchange(launch_, nullptr);
      }
      reserve_stacks(launch->threads);
      // Of its own, so that AddressSanitizer sees an access past its end.
      const std::unique_ptr<void, void (*)(void*)> shared(
          std::aligned_alloc(kShared, (launch->dynamic_shared + kShared - 1) / kShared * kShared),
          std::free);
      launch->begin(resident_);
      for (unsigned index; launch->next_block(index);) {
        poison_shared_memory();
        if (launch->dynamic_shared > 0) std::memset(shared.get(), 0xff, launch->dynamic_shared);
        block = &block_;
        block_.prepare(*launch, resident_, index, stacks_ + kPage, kStack, kStack - kPage,
                       shared.get());
        block_.run();
      }
      if (launch->failed()) forget_stacks();
      launch->end(resident_);
      done_();
    }
  }

  // Each begins with a page that cannot be touched, so that an overflow ends the process. Where a
  // large chip is full, not all do: Linux gives a process 65,530 mappings, and each page makes two.
  void reserve_stacks(unsigned threads) {
    if (threads <= stack_count_) return;
    forget_stacks();  // whatever comes to lie there next is not theirs
    if (stacks_ != nullptr) munmap(stacks_, stack_count_ * kStack);
    void* memory = mmap(nullptr, threads * kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stacks_ = static_cast<char*>(memory);
    stack_count_ = threads;
    if (resident_ >= kGuardedResidents) return;
    for (unsigned i = 0; i < threads; ++i) mprotect(stacks_ + i * kStack, kPage, PROT_NONE);
  }

  void forget_stacks() {
    for (unsigned i = 0; i < stack_count_; ++i)
      forget_stack(stacks_ + i * kStack + kPage, kStack - kPage);
  }

  std::function<void()> done_;
  std::mutex mutex_;
  std::condition_variable wake_;
  Launch* launch_ = nullptr;
  int resident_ = 0;
  Block block_;
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
std::size_t last_shared = 0;
std::map<const void*, std::size_t> allowed;  // dynamic shared memory, by kernel

}  // namespace

void configure(Chip chip, Order order, unsigned seed) {
  settings.chip = chip;
  settings.order = order;
  settings.seed = seed;
}

void select_blocks(unsigned first, unsigned count) {
  settings.first_block = first;
  settings.block_count = count;
}

const char* last_error() { return error.c_str(); }

std::size_t last_dynamic_shared() { return last_shared; }

void allow_dynamic_shared(const void* kernel, std::size_t bytes) {
  std::unique_lock<std::mutex> lock(launching);
  allowed[kernel] = bytes;
}

std::size_t dynamic_shared_allowed(const void* kernel) {
  std::unique_lock<std::mutex> lock(launching);
  const auto found = allowed.find(kernel);
  return found != allowed.end() ? found->second : 0;
}

int run_grid(unsigned blocks, unsigned threads, std::size_t dynamic_shared, bool cooperative,
             void (*body)(void*), void* arguments) {
  std::unique_lock<std::mutex> lock(launching);
  error.clear();
  last_shared = dynamic_shared;
  const std::uint64_t selected_end = std::uint64_t{settings.first_block} + settings.block_count;
  if (blocks == 0 || blocks > 0x7fffffffu || threads == 0 || threads > kMaxThreads ||
      threads % kWarp != 0 || selected_end > blocks) {
    error = "invalid configuration: " + std::to_string(blocks) + " blocks of " +
            std::to_string(threads) + " threads";
    return cudaErrorInvalidConfiguration;
  }
  const unsigned capacity =
      static_cast<unsigned>(settings.chip.sm_count * settings.chip.blocks_per_sm);
  unsigned residents = settings.block_count > 0 ? settings.block_count : blocks;
  if (cooperative) {
    if (blocks > capacity) {
      error = "cooperative launch of " + std::to_string(blocks) + " blocks where " +
              std::to_string(capacity) + " fit";
      return cudaErrorCooperativeLaunchTooLarge;
    }
  } else {
    // An ordinary launch promises nothing about who runs beside whom: one block at a time has to
    // do, and a few must not harm each other.
    residents = std::min(residents, settings.random() ? std::min(capacity, 4u) : 1u);
  }
  static Pool* pool = new Pool;  // never destroyed: its threads sleep in it at exit
  Launch launch(settings, blocks, threads, dynamic_shared, static_cast<int>(residents), body,
                arguments);
  pool->run(launch, static_cast<int>(residents));
  error = launch.error();
  return launch.failed() ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace simt
