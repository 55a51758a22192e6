// Products with more in their epilogue on a GPU, or nothing where there is no kernel for the call: for
// another architecture, dtype or alignment, or in a library that was built without CUTLASS.
#pragma once

#include "products.h"

namespace fastvit {

std::optional<Activated> fused_activated(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                         Activation activation, bool keep_before);

std::optional<ActivatedGradients> fused_activated_backward(const Tensor& grad, const Tensor& weight,
                                                           const Tensor& before, Activation activation,
                                                           bool needs_bias);

// residual + layer_scale * (x weight^T + bias), and its moments.
std::optional<WithMoments> fused_residual(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                          const OptionalTensor& layer_scale, const Tensor& residual);

}  // namespace fastvit
