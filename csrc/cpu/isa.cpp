#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace brn::cpu {
namespace {

const Isa& choose() {
#if defined(__x86_64__)
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  const auto wished = [wish](const char* name) {
    return wish == nullptr || std::strcmp(wish, name) == 0;
  };
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && wished("avx512")) return isa_avx512();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && (wished("avx2") || wished("avx512"))) return isa_avx2();
#endif
  return isa_baseline();
}

}  // namespace

const Isa& isa() {
  static const Isa& chosen = choose();
  return chosen;
}

}  // namespace brn::cpu
