// norm1 and the QKV projection: linear(norm(x)), of one weight or of several side by side.
#include "needs.h"
#include "products.h"
#include "scope.h"

namespace fastvit {
namespace {

// The products with all weights, side by side.
Tensor linear_of_all(const Tensor& x, const Tensors& weights, const Tensors& biases, bool tf32) {
  const auto bias = [&](std::size_t i) { return biases.empty() ? OptionalTensor() : OptionalTensor(biases[i]); };
  if (weights.size() == 1) return linear(x, weights[0], bias(0), tf32);
  std::int64_t width = 0, at = 0;
  for (const Tensor& weight : weights) width += outputs_of(weight);
  Tensor out = empty_beside(x, {x.size(0), width}, x.scalar_type());
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const std::int64_t own = outputs_of(weights[i]);
    linear_into(torch::stable::narrow(out, 1, at, own), x, weights[i], bias(i), tf32);
    at += own;
  }
  return out;
}

}  // namespace

WithSaved layer_norm_linear_fwd(Tensor x, OptionalTensor norm_weight, OptionalTensor norm_bias, Tensors weights,
                                Tensors biases, double eps, std::string norm, Tensors folded,
                                OptionalTensor moments, bool save, bool tf32) {
  STD_TORCH_CHECK(!weights.empty() && (biases.empty() || weights.size() == biases.size()),
                  "layer_norm_linear: a weight at least is wanted, and a bias for each or none");
  const Scope scope("layer_norm_linear", x, weights[0]);
  const Norm how{norm_weight, norm_bias, norm == "rms_norm", eps};
  const Tensor rows = as_rows(x);
  if (!save) {
    if (auto out = folded_linear(rows, how, folded, std::nullopt, moments)) return {shaped_like(x, *out), {}};
  }
  const Normalized h = norm_rows(rows, how, weights[0].scalar_type(), moments);
  const Tensor out = shaped_like(x, linear_of_all(h.rows, weights, biases, tf32));
  return {out, save ? Tensors{h.mean, h.rstd} : Tensors{}};
}

Tensors layer_norm_linear_bwd(Tensor grad, Tensor x, Tensors saved, OptionalTensor norm_weight,
                              OptionalTensor norm_bias, Tensor weight, double eps, std::string norm,
                              std::int64_t needs, bool tf32) {
  const Scope scope("layer_norm_linear's gradient", x, weight);
  Needs next(needs);
  const bool needs_x = next.next(), needs_norm_weight = next.next(), needs_norm_bias = next.next();
  const bool needs_weight = next.next(), needs_bias = next.next();

  const Norm how{norm_weight, norm_bias, norm == "rms_norm", eps};
  const Tensor rows = as_rows(x), dy = as_rows(grad);
  const Tensor &mean = saved[0], &rstd = saved[1];
  LinearGradients product;
  if (needs_weight || needs_bias) {
    const Tensor h = needs_weight ? renorm_rows(rows, mean, rstd, how, weight.scalar_type()) : rows;
    product = linear_weight_gradients(dy, h, needs_weight, needs_bias, tf32);
  }
  NormGradients before;
  if (needs_x || needs_norm_weight || needs_norm_bias) {
    before = norm_rows_backward(linear_input_gradient(dy, weight, tf32), rows, mean, rstd, how, std::nullopt,
                                needs_x, needs_norm_weight, needs_norm_bias);
  }
  if (before.x) before.x = shaped_like(x, *before.x);
  return present({before.x, before.weight, before.bias, product.weight, product.bias});
}

}  // namespace fastvit
