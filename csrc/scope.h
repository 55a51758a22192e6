// What every op does first: the tensors' device is the current one, and an error says in which op it arose.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "tensors.h"

namespace fastvit {

// The op, shape and dtype at hand, for error messages.
inline thread_local std::string current_op;

class Scope {
 public:
  Scope(const char* op, const Tensor& x, const Tensor& weight) {
    if (x.is_cuda()) guard_.emplace(x.get_device());
    current_op = std::string(op) + " of [";
    for (std::int64_t i = 0; i < x.dim(); ++i) {
      current_op += (i ? ", " : "") + std::to_string(x.size(i));
    }
    current_op += std::string("] in ") + name_of(weight.scalar_type());
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// rows [T, D] as [..., D], the leading sizes being those of x.
inline Tensor shaped_like(const Tensor& x, const Tensor& rows) {
  Sizes sizes = sizes_of(x);
  sizes.back() = rows.size(1);
  return viewed(rows, sizes);
}

}  // namespace fastvit
