// Contexts that hand control to one another inside an OS thread, with the notes that
// AddressSanitizer and ThreadSanitizer (-DSIMT_TSAN) need for it.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif

#if !defined(__x86_64__) || defined(SIMT_UCONTEXT)
#define SIMT_PORTABLE_FIBERS 1
#include <ucontext.h>
#endif

namespace simt {

struct Fiber {
#if defined(SIMT_PORTABLE_FIBERS)
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
#if defined(SIMT_ASAN)
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  std::size_t stack_size = 0;
#endif
#if defined(SIMT_TSAN)
  void* thread = nullptr;  // what ThreadSanitizer takes it for
#endif
};

// Prepares `fiber` to run entry() on a stack when it is switched to for the first time. entry
// begins with fiber_entered() and never returns.
void make_fiber(Fiber& fiber, char* stack, std::size_t size, void (*entry)());

// The first statement of a fiber's entry; `from` is the fiber that switched to it.
void fiber_entered(Fiber& from);

// Lets go of a fiber that will not run again.
void end_fiber(Fiber& fiber);

// Saves the running context in `from` and continues `to`. The last switch of a fiber says so.
void switch_fiber(Fiber& from, Fiber& to, bool last = false);

// What the running fiber did before happens_before(mark) is ordered before what another does after
// happens_after(mark). Switching alone orders nothing: threads of a block run at the same time.
void happens_before(void* mark);
void happens_after(void* mark);

// A stack that was abandoned half-way still carries AddressSanitizer's marks.
void forget_stack(char* stack, std::size_t size);

}  // namespace simt
