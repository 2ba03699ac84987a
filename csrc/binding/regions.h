// Whether a forward runs where activation checkpointing may run it again, or is doing so: inside a
// backward pass, or under saved-tensor hooks. Both are thread-local in libtorch, which says so to
// Python and in C++ but not through its stable ABI. So its two functions are weak here: without
// them, or with hooks that are kept in another way, which batchrenorm_cuda/checkpoint.py finds out,
// the answer is no.
#pragma once

#include <array>
#include <deque>

extern "C" {
// int torch::autograd::get_current_graph_task_id()
int brn_graph_task() __asm__("_ZN5torch8autograd25get_current_graph_task_idEv")
    __attribute__((weak));
// const at::impl::SavedTensorDefaultHooksTLS& at::SavedTensorDefaultHooks::get_tls_state(): the
// stack of pairs of hooks comes first.
const void* brn_saved_tensor_hooks() __asm__("_ZN2at23SavedTensorDefaultHooks13get_tls_stateEv")
    __attribute__((weak));
}

namespace brn::binding {

inline bool hooks_are_legible = false;

inline bool under_saved_tensor_hooks() {
  using Pair = std::array<void*, 4>;  // each hook with its interpreter
  if (!brn_saved_tensor_hooks || !brn_graph_task) return false;
  return !static_cast<const std::deque<Pair>*>(brn_saved_tensor_hooks())->empty();
}

inline bool inside_backward() { return brn_graph_task && brn_graph_task() != -1; }

inline bool may_repeat() {
  return inside_backward() || (hooks_are_legible && under_saved_tensor_hooks());
}

}  // namespace brn::binding
