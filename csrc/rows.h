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

// The same rows again from their statistics.
Tensor renorm_rows(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Norm& norm, ScalarType dtype);

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
