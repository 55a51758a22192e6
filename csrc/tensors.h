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

using Sizes = std::vector<std::int64_t>;

inline Sizes sizes_of(const Tensor& x) {
  const auto size = x.sizes();
  return Sizes(size.begin(), size.end());
}

// Of rows without gaps.
inline Sizes strides_for(const Sizes& sizes) {
  Sizes strides(sizes.size(), 1);
  for (std::size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
  return strides;
}

// An uninitialised tensor on the device of another. By torch's C functions, here and below: a call through its
// dispatcher by name takes as long as a small kernel.
inline Tensor empty_beside(const Tensor& other, const Sizes& sizes, ScalarType dtype) {
  std::int32_t type = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(other.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(other.get(), &index));
  const auto code = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(std::int64_t(sizes.size()), sizes.data(),
                                                  strides_for(sizes).data(), code, type, index, &made));
  return Tensor(made);
}

inline Tensor empty_like_as(const Tensor& other, ScalarType dtype) {
  return empty_beside(other, sizes_of(other), dtype);
}

// The numbers of a contiguous tensor in other sizes.
inline Tensor viewed(const Tensor& x, const Sizes& sizes) {
  AtenTensorHandle view = nullptr;
  constexpr std::int64_t further = 0;  // from where x begins
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(x.get(), std::int64_t(sizes.size()), sizes.data(),
                                                        strides_for(sizes).data(), further, &view));
  return Tensor(view);
}

inline Tensor packed(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// Contiguous rows [T, D] of [..., D]: a view where the tensor is contiguous, else one copy.
inline Tensor as_rows(const Tensor& x) {
  const Tensor dense = packed(x);
  const std::int64_t cols = x.size(x.dim() - 1);
  return x.dim() == 2 ? dense : viewed(dense, {cols == 0 ? 0 : x.numel() / cols, cols});
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
