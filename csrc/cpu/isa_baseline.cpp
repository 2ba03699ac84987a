// The sweeps for any processor of this architecture.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define BRN_VECTOR_BYTES 16
#include "sweeps.h"

namespace brn::cpu {

const Isa& isa_baseline() {
  static constexpr Isa isa = table("baseline");
  return isa;
}

}  // namespace brn::cpu
