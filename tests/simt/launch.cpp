#include "launch.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <thread>

namespace simt {
namespace {

constexpr int kPatience = 8;  // polls in vain, of every block, before it is a deadlock

}  // namespace

Launch::Launch(const Settings& settings_, unsigned blocks_, unsigned threads_,
               std::size_t dynamic_shared_, int residents, void (*body_)(void*), void* arguments_)
    : settings(settings_),
      blocks(blocks_),
      threads(threads_),
      dynamic_shared(dynamic_shared_),
      body(body_),
      arguments(arguments_),
      residents_(static_cast<std::size_t>(residents)),
      block_order_(settings.block_count > 0 ? settings.block_count : blocks),
      random_(settings.seed * 7919u + 1) {
  std::iota(block_order_.begin(), block_order_.end(), settings.first_block);
  if (settings.order == Order::kDescending) std::reverse(block_order_.begin(), block_order_.end());
  if (settings.random()) {
    std::shuffle(block_order_.begin(), block_order_.end(), random_);
    turn_ = static_cast<int>(random_() % residents_.size());
  }
}

void Launch::fail(const std::string& what) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!failed()) error_ = what;
  failed_ = true;
  for (Resident& r : residents_) r.wake.notify_one();
}

void Launch::add_to_error(const std::string& what) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (error_.size() < 1000) error_ += "\n  " + what;
}

bool Launch::next_block(unsigned& index) {
  const std::size_t ticket = ticket_++;
  if (ticket >= block_order_.size() || failed()) return false;
  index = block_order_[ticket];
  return true;
}

void Launch::begin(int me) {
  std::unique_lock<std::mutex> lock(mutex_);
  wait_for_turn(me, lock);
}

void Launch::end(int me) {
  std::unique_lock<std::mutex> lock(mutex_);
  residents_[me].alive = false;
  ++epoch_;
  pass_turn(me);
}

void Launch::step_aside(int me) {
  std::unique_lock<std::mutex> lock(mutex_);
  residents_[me].polls = 0;
  pass_turn(me);
  wait_for_turn(me, lock);
}

bool Launch::wait_for_others(int me, bool moved) {
  std::unique_lock<std::mutex> lock(mutex_);
  Resident& self = residents_[me];
  if (moved) ++epoch_;
  if (self.epoch != epoch_) self.polls = 0;
  self.epoch = epoch_;
  ++self.polls;
  const bool dead = std::all_of(residents_.begin(), residents_.end(), [this](const Resident& r) {
    return !r.alive || (r.epoch == epoch_ && r.polls >= kPatience);
  });
  if (dead) return false;
  if (settings.serial()) {
    pass_turn(me);
    wait_for_turn(me, lock);
  } else {
    const bool patient = self.polls > 4 * kPatience;
    lock.unlock();
    if (patient)
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    else
      std::this_thread::yield();
  }
  return true;
}

void Launch::wait_for_turn(int me, std::unique_lock<std::mutex>& lock) {
  if (!settings.serial()) return;
  residents_[me].wake.wait(lock, [&] { return turn_ == me || failed(); });
}

// To the next resident; in random order to any, but mostly to one that can go on.
void Launch::pass_turn(int me) {
  if (!settings.serial()) return;
  const int count = static_cast<int>(residents_.size());
  int step = 1;
  if (settings.random()) {
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

}  // namespace simt
