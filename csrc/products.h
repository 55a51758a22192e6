// The matrix products. products_cpu.cpp (panels.h, oneDNN and ATen) and products_cublaslt.cpp hold one each, but
// folded_linear's for a GPU is in fused_products.cpp.
//
// x is [T, K] and weight [D, K], Linear's layout, in one dtype; bias is [D] or absent. On a CPU a weight may be
// one that oneDNN packed, or in panels.
#pragma once

#include "rows.h"
#include "tensors.h"

namespace fastvit {

// D of a weight, which in panels is [D / 16, K, 16].
inline std::int64_t outputs_of(const Tensor& weight) {
  return weight.dim() == 3 ? weight.size(0) * weight.size(2) : weight.size(0);
}

// x weight^T + bias.
Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool tf32);

// The same into out [T, D], whose rows may be apart: some columns of a wider output.
void linear_into(Tensor out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool tf32);

// residual + layer_scale * (x weight^T + bias), in the residual's dtype: that of x, or float32 beside half precision.
// layer_scale is [D] or absent.
Tensor linear_add(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& layer_scale,
                  const Tensor& residual, bool tf32);

struct WithMoments {
  Tensor rows;
  Tensor moments;  // of the rows, as row_moments has them
};

// The same with the moments of what it returns, by one product where a GPU has a kernel for it.
WithMoments linear_add_with_moments(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                    const OptionalTensor& layer_scale, const Tensor& residual, bool tf32);

struct Activated {
  Tensor rows;
  OptionalTensor before;  // x weight^T + bias, where it was asked for
};

// activation(x weight^T + bias). With `fused` a GPU's product has the activation in its epilogue where there is a
// kernel for it; a CPU's has it whenever that is faster.
Activated linear_activated(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                           Activation activation, bool keep_before, bool fused, bool tf32);

// activation(norm(x) W^T + b), or that without an activation, where it can be had from x as it is; else nothing, as on
// a CPU. `folded` is empty, or what becomes of the norm's parameters, W and b: W' [D, K] in the dtype of x, the sums
// of its rows and a bias, both [D] in float32. The norm's own weight and bias are not read again, nor are the rows for
// their statistics where their moments are there.
OptionalTensor folded_linear(const Tensor& x, const Norm& norm, const std::vector<Tensor>& folded,
                             std::optional<Activation> activation, const OptionalTensor& moments);

// grad weight, for grad [T, D]: the gradient of x.
Tensor linear_input_gradient(const Tensor& grad, const Tensor& weight, bool tf32);

struct ActivatedGradients {
  Tensor before;        // of what entered the activation
  Tensor activated;     // the activation once more
  OptionalTensor bias;  // the sum of the rows of `before`, where it was asked for and came with the product
};

// grad weight through the activation, for grad [T, D] and before [T, M], which is what entered it.
ActivatedGradients linear_activated_backward(const Tensor& grad, const Tensor& weight, const Tensor& before,
                                             Activation activation, bool needs_bias, bool fused, bool tf32);

struct LinearGradients {
  OptionalTensor weight, bias;
};

// grad^T x and the sum of grad's rows, of which at least one is needed.
LinearGradients linear_weight_gradients(const Tensor& grad, const Tensor& x, bool needs_weight, bool needs_bias,
                                        bool tf32);

}  // namespace fastvit
