// One launch: which blocks are still to run, whose turn it is, and whether anybody can still go on.
#pragma once

#include "scheduler.h"

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <random>
#include <string>
#include <vector>

namespace simt {

struct Settings {
  Chip chip;
  Order order = Order::kAscending;
  unsigned seed = 0;
  unsigned first_block = 0;
  unsigned block_count = 0;  // 0: all

  bool serial() const { return order != Order::kParallel; }
  bool random() const { return order == Order::kRandom || order == Order::kParallel; }
};

class Launch {
 public:
  // A resident is an OS thread that runs one block after another; in all orders but kParallel only
  // the one whose turn it is does.
  Launch(const Settings& settings, unsigned blocks, unsigned threads, std::size_t dynamic_shared,
         int residents, void (*body)(void*), void* arguments);

  const Settings settings;
  const unsigned blocks;
  const unsigned threads;
  const std::size_t dynamic_shared;  // bytes
  void (*const body)(void*);
  void* const arguments;

  bool failed() const { return failed_.load(std::memory_order_relaxed); }
  const std::string& error() const { return error_; }
  void fail(const std::string& what);
  void add_to_error(const std::string& what);  // for the other blocks of a deadlock

  bool next_block(unsigned& index);

  void begin(int me);
  void end(int me);
  void step_aside(int me);  // another block may run before this one goes on

  // Nothing of this block can go on until another block has done something. False if no other ever
  // will. `moved`: this block has done more than poll since its last call, so what the others wait
  // for may be there now.
  bool wait_for_others(int me, bool moved);

 private:
  struct Resident {
    bool alive = true;
    std::uint64_t epoch = 0;  // up to which it has looked at what the others did
    int polls = 0;            // in vain, since then
    std::condition_variable wake;
  };

  void wait_for_turn(int me, std::unique_lock<std::mutex>& lock);
  void pass_turn(int me);

  std::mutex mutex_;
  std::vector<Resident> residents_;
  std::vector<unsigned> block_order_;
  std::atomic<std::size_t> ticket_{0};
  std::atomic<bool> failed_{false};
  std::string error_;
  std::mt19937 random_;
  std::uint64_t epoch_ = 0;  // counts what blocks did before they had to wait
  int turn_ = 0;
};

}  // namespace simt
