// How the bindings say no.
#pragma once

#include <sstream>
#include <stdexcept>

namespace brn::binding {

// A RuntimeError in Python. Not STD_TORCH_CHECK, whose messages begin with a function name, a path
// and a line.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace brn::binding
