#include "fiber.h"

#include <cstdint>

#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(SIMT_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* mark);
void __tsan_release(void* mark);
}
#endif

#if !defined(SIMT_PORTABLE_FIBERS)
// Callee-saved registers of the System V ABI go to the old stack, the stack pointer changes, and
// they come back from the new one: 5 ns, where swapcontext() makes a system call and takes 300.
extern "C" void simt_switch_stack(void** save, void* load);
asm(R"(
.text
.globl simt_switch_stack
.hidden simt_switch_stack
.type simt_switch_stack,@function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack,.-simt_switch_stack
)");
#endif

namespace simt {

void make_fiber(Fiber& fiber, char* stack, std::size_t size, void (*entry)()) {
#if defined(SIMT_PORTABLE_FIBERS)
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = size;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  auto* top = reinterpret_cast<void**>(reinterpret_cast<std::uintptr_t>(stack + size) &
                                       ~std::uintptr_t{15});
  *--top =
      nullptr;  // the return address of entry(), which leaves the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
#endif
#if defined(SIMT_ASAN)
  fiber.fake_stack = nullptr;
  fiber.stack = stack;
  fiber.stack_size = size;
#endif
#if defined(SIMT_TSAN)
  end_fiber(fiber);
  fiber.thread = __tsan_create_fiber(0);
#endif
}

void end_fiber(Fiber& fiber) {
#if defined(SIMT_TSAN)
  if (fiber.thread != nullptr) __tsan_destroy_fiber(fiber.thread);
  fiber.thread = nullptr;
#else
  (void)fiber;
#endif
}

void happens_before(void* mark) {
#if defined(SIMT_TSAN)
  __tsan_release(mark);
#else
  (void)mark;
#endif
}

void happens_after(void* mark) {
#if defined(SIMT_TSAN)
  __tsan_acquire(mark);
#else
  (void)mark;
#endif
}

void fiber_entered(Fiber& from) {
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &from.stack, &from.stack_size);
#else
  (void)from;
#endif
}

void switch_fiber(Fiber& from, Fiber& to, bool last) {
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.stack_size);
#else
  (void)last;
#endif
#if defined(SIMT_TSAN)
  constexpr unsigned kUnordered = 1;
  if (from.thread == nullptr) from.thread = __tsan_get_current_fiber();  // the OS thread's own
  __tsan_switch_to_fiber(to.thread, last ? 0 : kUnordered);
#endif
#if defined(SIMT_PORTABLE_FIBERS)
  swapcontext(&from.context, &to.context);
#else
  simt_switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void forget_stack(char* stack, std::size_t size) {
#if defined(SIMT_ASAN)
  ASAN_UNPOISON_MEMORY_REGION(stack, size);
#else
  (void)stack;
  (void)size;
#endif
}

}  // namespace simt
