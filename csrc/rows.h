// What happens to rows of numbers between the matrix products. rows_cpu.cpp and rows_cuda.cu hold one each.
//
// Tensors are contiguous [T, D] unless said otherwise, vectors [D]. Arithmetic is in float32, or float64 for
// float64. A row's dtype is float16, bfloat16, float32 or float64 (float64 on a CPU only, float16 on a GPU
// only), with these pairs of (input, output): equal ones, and float32 with either half.
#pragma once

#include "activation_names.h"
#include "tensors.h"

namespace fastvit {

struct Normalized {
  Tensor rows;
  Tensor mean, rstd;  // [T], of statistics_dtype; mean is [0] for RMSNorm
};

struct NormGradients {
  OptionalTensor x;             // in the dtype of x
  OptionalTensor weight, bias;  // in the dtype of the weight
};

struct Norm {
  OptionalTensor weight, bias;  // [D], in the rows' dtype or float32
  bool rms;
  double eps;
};

// LayerNorm or RMSNorm of each row of x, in dtype.
Normalized norm_rows(const Tensor& x, const Norm& norm, ScalarType dtype);

struct Statistics {
  Tensor mean, rstd;  // [T], of statistics_dtype; mean is [0] for RMSNorm
};

// The moments of rows (row_moments.h) [moment_parts(D), T, 2] of statistics_dtype: of each part the mean, and the sum
// of squares after it.
Tensor row_moments(const Tensor& x);

// Moments that came in, if they can be those of x in so many parts, without gaps.
inline Tensor checked_moments(const Tensor& moments, const Tensor& x, std::int64_t parts) {
  STD_TORCH_CHECK(moments.dim() == 3 && moments.size(0) == parts && moments.size(1) == x.size(0) &&
                      moments.size(2) == 2 && moments.scalar_type() == statistics_dtype(x.scalar_type()),
                  "moments do not fit rows of [", x.size(0), ", ", x.size(1), "]");
  return packed(moments);
}

// What the norm takes from each of the rows x, from their moments.
Statistics statistics_of_moments(const Tensor& moments, const Tensor& x, const Norm& norm);

// The same rows again from their statistics.
Tensor renorm_rows(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Norm& norm, ScalarType dtype);

// norm_rows where the moments of x may be there: what else it would read the rows for once more.
inline Normalized norm_rows(const Tensor& x, const Norm& norm, ScalarType dtype, const OptionalTensor& moments) {
  if (!moments) return norm_rows(x, norm, dtype);
  const Statistics of = statistics_of_moments(*moments, x, norm);
  return {renorm_rows(x, of.mean, of.rstd, norm, dtype), of.mean, of.rstd};
}

// The norm's gradients from grad [T, D], of which some may not be needed. beside [T, D], in the dtype of x and
// of any strides, is added to the gradient of x: what comes around the norm by the residual. The sums over T
// are in a fixed order.
NormGradients norm_rows_backward(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                                 const Norm& norm, const OptionalTensor& beside, bool needs_x,
                                 bool needs_weight, bool needs_bias);

// activation(gate) * value, or activation(value) without a gate. Rows may be apart (views of a wider tensor).
Tensor activate(const Tensor& value, const OptionalTensor& gate, Activation activation);

struct ActivationGradients {
  Tensor value;         // like the rows it is the gradient of, and where `packed` says
  OptionalTensor gate;  // absent without a gate
  Tensor activated;     // the activation once more, which the forward pass does not keep
};

// Gradients through `activate` from grad [T, M], whose memory may become a result's. With `packed` they are the
// two halves of one [T, 2M], the gate's first.
ActivationGradients activate_backward(const Tensor& grad, const Tensor& value, const OptionalTensor& gate,
                                      Activation activation, bool packed);

// residual + sample_scale * layer_scale * y, in the residual's dtype; [D] or absent, and [B] or absent, where a
// sample is T / B rows. y may be in half precision beside a residual in float32.
Tensor add_scaled(const Tensor& residual, const Tensor& y, const OptionalTensor& layer_scale,
                  const OptionalTensor& sample_scale);

// sample_scale * layer_scale * x in dtype: the gradient as it enters a branch. x may have any strides.
Tensor scale(const Tensor& x, const OptionalTensor& layer_scale, const OptionalTensor& sample_scale,
             ScalarType dtype);

// [D]: the sum over the rows of a * b, both [T, D] in one dtype, in a fixed order, in dtype.
Tensor sum_products(const Tensor& a, const Tensor& b, ScalarType dtype);

// [D]: the sum of the rows of x [T, D], in a fixed order, in the dtype of x.
Tensor sum_rows(const Tensor& x);

}  // namespace fastvit
