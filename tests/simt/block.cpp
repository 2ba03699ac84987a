#include "block.h"

#include "include/cuda_runtime.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

__thread simt::Index threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

__thread Block* block;

namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

std::string at(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash != nullptr ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

const char* name(Operation operation) {
  switch (operation) {
    case Operation::kBarrier: return "__syncthreads";
    case Operation::kShuffleXor: return "__shfl_xor_sync";
    case Operation::kShuffleDown: return "__shfl_down_sync";
    case Operation::kShuffle: return "__shfl_sync";
    case Operation::kSyncWarp: return "__syncwarp";
    case Operation::kPause: return "__nanosleep";
  }
  return "";
}

std::string whereabouts(const Thread& t) {
  switch (t.state) {
    case kAtBarrier:
    case kInExchange: return std::string("in ") + name(t.operation) + ", " + at(t.site);
    case kSpinning: return "waiting for another block, " + at(t.site);
    case kExited: return "done";
    default: return "running";
  }
}

bool same_place(const Thread& a, const Thread& b) {
  return a.site.line == b.site.line && a.operation == b.operation &&
         std::strcmp(a.site.file, b.site.file) == 0;
}

void start_fiber() { block->enter_kernel(); }

}  // namespace

void Block::prepare(Launch& launch, int resident, unsigned index, char* stacks, std::size_t stride,
                    std::size_t stack_size, void* dynamic_shared) {
  launch_ = &launch;
  resident_ = resident;
  index_ = index;
  dynamic_shared_ = dynamic_shared;
  preempted_ = false;
  moved_ = true;
  random_.seed(launch.settings.seed * 104729u + index);
  threads_.resize(launch.threads);
  warps_.resize(launch.threads / kWarp);
  warp_order_.resize(warps_.size());
  std::fill(in_, in_ + kStates, 0);
  in_[kReady] = static_cast<int>(launch.threads);
  for (Warp& w : warps_) {
    std::memset(w.slot, 0xff, sizeof w.slot);
    std::fill(w.in, w.in + kStates, 0);
    w.in[kReady] = kWarp;
  }
  for (unsigned i = 0; i < launch.threads; ++i) {
    Thread& t = threads_[i];
    t.state = kReady;
    t.index = i;
    t.exchanges = 0;
    t.barriers = 0;
    t.copies.clear();
    // Stacks that all began at the same offset in a page would share a few lines of the L1 cache.
    const std::size_t colour = i * 13 % 61 * 64;
    make_fiber(t.fiber, stacks + i * stride, stack_size - colour, start_fiber);
  }
  choose_order();
  blockIdx.x = index;
  blockDim.x = launch.threads;
  gridDim.x = launch.blocks;
}

void Block::run() {
  run_threads();
  for (Thread& t : threads_) end_fiber(t.fiber);
}

void Block::run_threads() {
  const int threads = static_cast<int>(threads_.size());
  const Settings& settings = launch_->settings;
  while (in_[kExited] != threads) {
    if (settings.random()) std::shuffle(warp_order_.begin(), warp_order_.end(), random_);
    for (const int warp : warp_order_) {
      // In random order a warp may be stopped after a few shuffles, so that others overtake it.
      const bool brief = settings.random() && !chance(4);
      run_warp(warp, brief ? 1 + static_cast<int>(random_() % 4) : 1 << 30);
      if (launch_->failed()) return;
    }
    if (release_barrier()) {
      if (settings.order == Order::kRandom && chance(4)) launch_->step_aside(resident_);
      continue;
    }
    if (launch_->failed()) return;
    if (in_[kReady] > 0 || in_[kExited] == threads) continue;
    if (in_[kSpinning] == 0) {
      launch_->fail("deadlock in " + describe());
      return;
    }
    const bool moved = moved_;
    moved_ = false;
    if (!launch_->wait_for_others(resident_, moved)) {
      launch_->fail("deadlock, no block can go on:\n  " + describe());
      return;
    }
    if (launch_->failed()) {
      launch_->add_to_error(describe());
      return;
    }
    for (Thread& t : threads_) {
      if (t.state == kSpinning) move_to(t, kReady);
    }
  }
}

void Block::enter_kernel() {
  fiber_entered(scheduler_);
  launch_->body(launch_->arguments);
  Thread& self = *current_;
  if (!self.copies.empty()) fail(self.site, "a thread ends before its asynchronous copies");
  move_to(self, kExited);
  switch_fiber(self.fiber, scheduler_, true);
  std::abort();
}

void Block::wait(State state, Site site, Operation operation) {
  Thread& self = *current_;
  if (state == kSpinning && site.line != self.site.line) moved_ = true;  // another loop than before
  self.site = site;
  self.operation = operation;
  move_to(self, state);
  switch_fiber(self.fiber, scheduler_);
}

void Block::sync(Site site) {
  void* mark = &mark_[current_->barriers++ & 1u];
  happens_before(mark);
  wait(kAtBarrier, site, Operation::kBarrier);
  happens_after(mark);
}

std::uint64_t Block::exchange(Site site, Operation operation, unsigned mask, std::uint64_t value,
                              int source) {
  if (mask != kAllLanes) fail(site, std::string(name(operation)) + " of a part of the warp");
  Thread& self = *current_;
  Warp& warp = warp_of(self);
  const unsigned parity = self.exchanges++ & 1u;
  const int own = lane();
  warp.slot[parity][own] = value;
  void* mark = operation == Operation::kSyncWarp ? &warp.mark[parity] : nullptr;
  if (mark != nullptr) happens_before(mark);
  wait(kInExchange, site, operation);
  if (mark != nullptr) happens_after(mark);
  return warp.slot[parity][source >= 0 && source < kWarp ? source : own];
}

void Block::may_be_preempted() {
  if (launch_->settings.order != Order::kRandom || chance(2)) return;
  preempted_ = true;
  switch_fiber(current_->fiber, scheduler_);
}

void* Block::dynamic_shared(Site site, std::size_t offset, std::size_t size) {
  if (offset + size > launch_->dynamic_shared)
    fail(site, "a place beyond the block's dynamic shared memory");
  return static_cast<char*>(dynamic_shared_) + offset;
}

void Block::issue_copy(Site site, const Copy& copy) {
  const auto begin = reinterpret_cast<std::uintptr_t>(dynamic_shared_);
  const auto to = reinterpret_cast<std::uintptr_t>(copy.to);
  if (copy.size != 4 && copy.size != 8 && copy.size != 16)
    fail(site, "an asynchronous copy of " + std::to_string(copy.size) + " bytes");
  if (to < begin || to + copy.size > begin + launch_->dynamic_shared)
    fail(site, "an asynchronous copy to beyond the block's dynamic shared memory");
  PendingCopy pending{copy, {}};
  std::memcpy(pending.source, copy.from, copy.size);
  for (const Thread& t : threads_) {
    for (const PendingCopy& other : t.copies) {
      const auto there = reinterpret_cast<std::uintptr_t>(other.copy.to);
      if (to < there + other.copy.size && there < to + copy.size)
        fail(site, "two asynchronous copies to one place");
    }
  }
  current_->copies.push_back(pending);
}

bool Block::next_landing(Site site, Copy& copy) {
  if (current_->copies.empty()) return false;
  const PendingCopy pending = current_->copies.back();
  current_->copies.pop_back();
  copy = pending.copy;
  if (std::memcmp(pending.source, copy.from, copy.size) != 0)
    fail(site, "the source of an asynchronous copy was overwritten before it landed");
  return true;
}

void Block::fail(Site site, const std::string& what) {
  launch_->fail(what + ", " + at(site) + ", in block " + std::to_string(index_) + ", thread " +
                std::to_string(current_->index));
  switch_fiber(current_->fiber, scheduler_);
  std::abort();
}

std::string Block::describe() const {
  std::string text = "block " + std::to_string(index_) + ":";
  int parts = 0;
  for (std::size_t i = 0; i < threads_.size();) {
    std::size_t end = i + 1;
    const std::string where = whereabouts(threads_[i]);
    while (end < threads_.size() && whereabouts(threads_[end]) == where) ++end;
    if (++parts > 4) return text + " ...";
    text += parts > 1 ? "; " : " ";
    text += (end == i + 1 ? "thread " : "threads ") + std::to_string(i);
    if (end > i + 1) text += "-" + std::to_string(end - 1);
    text += " " + where;
    i = end;
  }
  return text;
}

void Block::move_to(Thread& t, State state) {
  Warp& w = warp_of(t);
  --in_[t.state], --w.in[t.state];
  ++in_[state], ++w.in[state];
  t.state = state;
}

void Block::choose_order() {
  const Settings& settings = launch_->settings;
  for (std::size_t k = 0; k < warps_.size(); ++k) warp_order_[k] = static_cast<int>(k);
  if (settings.order == Order::kDescending) std::reverse(warp_order_.begin(), warp_order_.end());
  for (Warp& w : warps_) {
    for (int lane = 0; lane < kWarp; ++lane) w.lane_order[lane] = lane;
    if (settings.order == Order::kDescending) std::reverse(w.lane_order, w.lane_order + kWarp);
    if (settings.random()) std::shuffle(w.lane_order, w.lane_order + kWarp, random_);
  }
}

// Runs the threads of a warp until each waits, through at most `exchanges` shuffles.
void Block::run_warp(int warp, int exchanges) {
  Warp& w = warps_[warp];
  while (w.in[kReady] > 0 && exchanges > 0) {
    for (const int lane : w.lane_order) {
      Thread& t = threads_[warp * kWarp + lane];
      if (t.state != kReady) continue;
      current_ = &t;
      threadIdx.x = t.index;
      switch_fiber(scheduler_, t.fiber);
      moved_ = moved_ || t.state != kSpinning;
      if (preempted_) {
        preempted_ = false;
        launch_->step_aside(resident_);
      }
      if (launch_->failed()) return;
    }
    if (release_exchange(warp)) --exchanges;
  }
}

// If all threads that are left are at the barrier, and at the same one.
bool Block::release_barrier() {
  const int threads = static_cast<int>(threads_.size());
  if (in_[kAtBarrier] == 0 || in_[kAtBarrier] + in_[kExited] != threads) return false;
  const Thread* first = nullptr;
  for (const Thread& t : threads_) {
    if (t.state != kAtBarrier) continue;
    if (first == nullptr) first = &t;
    if (!same_place(*first, t)) {
      launch_->fail("divergent barrier in " + describe());
      return false;
    }
  }
  for (Thread& t : threads_) {
    if (t.state == kAtBarrier) move_to(t, kReady);
  }
  return true;
}

// Scope is the warp, never the block: `if (warp == 0) reduce()` is a normal second half of a
// reduction.
bool Block::release_exchange(int warp) {
  const Warp& w = warps_[warp];
  if (w.in[kInExchange] == 0 || w.in[kInExchange] + w.in[kExited] != kWarp) return false;
  Thread* lanes = &threads_[warp * kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    if (lanes[lane].state == kExited || !same_place(lanes[0], lanes[lane])) {
      launch_->fail("a shuffle without part of its warp in " + describe());
      return false;
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) move_to(lanes[lane], kReady);
  return true;
}

// ---- what the stand-in headers call ----

int lane() { return block->lane(); }
std::uint64_t exchange(Site site, Operation operation, unsigned mask, std::uint64_t value,
                       int source) {
  return block->exchange(site, operation, mask, value, source);
}
void sync_block(Site site) { block->sync(site); }
void spin_pause(Site site) { block->wait(kSpinning, site, Operation::kPause); }
void may_be_preempted() { block->may_be_preempted(); }
void* dynamic_shared(std::size_t offset, std::size_t size, const char* file, int line) {
  return block->dynamic_shared({file, line}, offset, size);
}
void issue_copy(Site site, const Copy& copy) { block->issue_copy(site, copy); }
bool next_landing(Site site, Copy& copy) { return block->next_landing(site, copy); }
void fail(Site site, const std::string& what) { block->fail(site, what); }

}  // namespace simt
