// How a branch ends: residual + sample_scale * layer_scale * (x weight^T + bias), and its gradients.
// linear_residual is nothing else, and layer_norm_mlp ends so.
#pragma once

#include "products.h"

namespace fastvit {

inline Tensor branch_end(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                         const Tensor& residual, const OptionalTensor& layer_scale,
                         const OptionalTensor& sample_scale, bool tf32) {
  if (!layer_scale && !sample_scale) return linear_add(x, weight, bias, residual, tf32);
  return add_scaled(residual, linear(x, weight, bias, tf32), layer_scale, sample_scale);
}

// The gradient of x from the branch's own, sample_scale already in it.
inline Tensor branch_input_gradient(const Tensor& grad, const Tensor& weight, const OptionalTensor& layer_scale,
                                    bool tf32) {
  return linear_input_gradient(grad, layer_scale ? scale_rows(weight, *layer_scale) : weight, tf32);
}

struct BranchGradients {
  OptionalTensor weight, bias, layer_scale;
};

// LayerScale is taken as part of the weight, W' = gamma W and b' = gamma b, so that the product itself need not
// be kept: dgamma = rowsum(dW' W) + db' b, dW = gamma dW', db = gamma db'.
inline BranchGradients branch_weight_gradients(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                               const OptionalTensor& bias, const OptionalTensor& layer_scale,
                                               bool needs_weight, bool needs_bias, bool needs_scale,
                                               bool tf32) {
  BranchGradients gradients;
  const bool weight_too = needs_weight || needs_scale, bias_too = needs_bias || (needs_scale && bias);
  if (!weight_too && !bias_too) return gradients;
  const LinearGradients product = linear_weight_gradients(grad, x, weight_too, bias_too, tf32);
  const auto unscaled = [&](const Tensor& g) { return layer_scale ? scale_rows(g, *layer_scale) : g; };
  if (needs_weight) gradients.weight = unscaled(*product.weight);
  if (needs_bias) gradients.bias = unscaled(*product.bias);
  if (needs_scale) {
    const OptionalTensor db = bias ? product.bias : std::nullopt;
    gradients.layer_scale = row_products(*product.weight, weight, db, bias, layer_scale->scalar_type());
  }
  return gradients;
}

}  // namespace fastvit
