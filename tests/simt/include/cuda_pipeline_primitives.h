// Asynchronous copies to shared memory for the stand-in CUDA runtime, late and strict: a copy lands
// when its thread waits for it, and until then what was there before is gone. So a missing wait, a
// copy to where somebody has still to read, and a source that is overwritten too early all show.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, std::size_t size,
                                    const char* file = __builtin_FILE(),
                                    int line = __builtin_LINE()) {
  const ::simt::Site site{file, line};
  ::simt::check_access(site, to, size);
  ::simt::check_access(site, from, size);
  ::simt::issue_copy(site, {to, from, size});
  std::memset(to, 0xff, size);
}

inline void __pipeline_commit() {}

inline void __pipeline_wait_prior(std::size_t prior, const char* file = __builtin_FILE(),
                                  int line = __builtin_LINE()) {
  const ::simt::Site site{file, line};
  if (prior != 0) ::simt::fail(site, "a wait for a part of the copies, which is not emulated");
  for (::simt::Copy copy; ::simt::next_landing(site, copy);)
    std::memcpy(copy.to, copy.from, copy.size);
}
