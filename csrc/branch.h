// How a branch ends: residual + sample_scale * layer_scale * (x weight^T + bias), and its gradients.
// linear_residual is nothing else, and layer_norm_mlp ends so.
#pragma once

#include "products.h"

namespace fastvit {

struct BranchEnd {
  Tensor out;
  OptionalTensor product;  // x weight^T + bias, which LayerScale's gradient needs; absent without `save`
  OptionalTensor moments;  // of out's rows, where they were asked for
};

inline BranchEnd branch_end(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                            const Tensor& residual, const OptionalTensor& layer_scale,
                            const OptionalTensor& sample_scale, bool save, bool with_moments, bool tf32) {
  if (!sample_scale && !(layer_scale && save)) {
    if (!with_moments) return {linear_add(x, weight, bias, layer_scale, residual, tf32), {}, {}};
    const WithMoments both = linear_add_with_moments(x, weight, bias, layer_scale, residual, tf32);
    return {both.rows, {}, both.moments};
  }
  const Tensor product = linear(x, weight, bias, tf32);
  const Tensor out = add_scaled(residual, product, layer_scale, sample_scale);
  return {out, layer_scale && save ? OptionalTensor(product) : std::nullopt,
          with_moments ? OptionalTensor(row_moments(out)) : std::nullopt};
}

// What of the branch's gradient is known before that of its product's operands.
struct BranchGradient {
  Tensor product;              // [T, D]: of x weight^T + bias
  OptionalTensor layer_scale;  // [D]
};

// LayerScale's own comes from the product. From the weight's, as rowsum(dW W), it would need no product, but in
// float32 it has twice the error of torch's at 1576 rows.
inline BranchGradient branch_gradient(const Tensor& grad, const OptionalTensor& product,
                                      const OptionalTensor& layer_scale, const OptionalTensor& sample_scale,
                                      ScalarType dtype, bool needs_scale) {
  const Tensor scaled = scale(grad, {}, sample_scale, dtype);
  if (!layer_scale) return {scaled, {}};
  OptionalTensor own;
  if (needs_scale) own = sum_products(scaled, *product, layer_scale->scalar_type());
  return {scale(scaled, layer_scale, {}, dtype), own};
}

// The weight's and the bias's from that of the product, of which none may be needed.
inline LinearGradients branch_weight_gradients(const Tensor& grad, const Tensor& x, bool needs_weight,
                                               bool needs_bias, bool tf32) {
  if (!needs_weight && !needs_bias) return {};
  return linear_weight_gradients(grad, x, needs_weight, needs_bias, tf32);
}

}  // namespace fastvit
