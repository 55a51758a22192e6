// Which inputs of a backward op need gradients, taken one by one, and the gradients in the same order.
#pragma once

#include <cstdint>

#include "ops.h"

namespace fastvit {

class Needs {
 public:
  explicit Needs(std::int64_t bits) : bits_(bits) {}
  bool next() { return bits_ >> taken_++ & 1; }

 private:
  std::int64_t bits_;
  int taken_ = 0;
};

// Those of the gradients that are there.
inline Tensors present(std::initializer_list<OptionalTensor> gradients) {
  Tensors found;
  for (const OptionalTensor& gradient : gradients) {
    if (gradient) found.push_back(*gradient);
  }
  return found;
}

}  // namespace fastvit
