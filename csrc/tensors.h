// Tensors of torch's stable ABI, and what both libraries need of them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

namespace fastvit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// An uninitialised tensor on the device of another.
inline Tensor empty_beside(const Tensor& other, std::initializer_list<std::int64_t> size, ScalarType dtype) {
  const std::vector<std::int64_t> sizes(size);
  return torch::stable::new_empty(other, sizes, dtype);
}

inline Tensor empty_like_as(const Tensor& other, ScalarType dtype) {
  const auto size = other.sizes();
  const std::vector<std::int64_t> sizes(size.begin(), size.end());
  return torch::stable::new_empty(other, sizes, dtype);
}

// Contiguous rows [T, D] of a contiguous [..., D]: a view where the tensor allows one, else one copy.
inline Tensor as_rows(const Tensor& x) {
  return torch::stable::reshape(torch::stable::contiguous(x), {-1, x.size(x.dim() - 1)});
}

inline Tensor as_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

// Statistics are float32 in every dtype but float64, which is there for gradcheck.
inline ScalarType statistics_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    default:
      return "another dtype";
  }
}

}  // namespace fastvit
