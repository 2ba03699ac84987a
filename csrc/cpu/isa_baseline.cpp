// The sweeps for any processor of this architecture.
#include <cmath>
#include <cstdint>
#include <cstring>

#define BRN_VECTOR_BYTES 16
#include "sweeps.h"

namespace brn::cpu {

const Isa& isa_baseline() {
  static constexpr Isa isa = table("baseline");
  return isa;
}

}  // namespace brn::cpu
