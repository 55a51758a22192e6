// The ops that both libraries register: <op>_fwd returns the output and what it saves for <op>_bwd.
//
// Their schemas are in fastvit/ops/native.py. x may have any strides and be float32 beside weights in half
// precision (autocast); every other tensor of a product has the weights' dtype. A backward op takes `needs`, a
// bit for each input that can have a gradient, in the order of the arguments, and returns those gradients.
// `folded` is as in products.h: it serves calls that save nothing, and any other has the norm and weight beside it.
// `moments` are those of x as row_moments has them (rows.h), or absent; `with_moments` asks for those of the output,
// which come after what is saved.
#pragma once

#include <tuple>

#include "tensors.h"

namespace fastvit {

using Tensors = std::vector<Tensor>;
using WithSaved = std::tuple<Tensor, Tensors>;

// Of several weights (q, k and v, say) the outputs are side by side; biases are as many, or none.
WithSaved layer_norm_linear_fwd(Tensor x, OptionalTensor norm_weight, OptionalTensor norm_bias, Tensors weights,
                                Tensors biases, double eps, std::string norm, Tensors folded,
                                OptionalTensor moments, bool save, bool tf32);
Tensors layer_norm_linear_bwd(Tensor grad, Tensor x, Tensors saved, OptionalTensor norm_weight,
                              OptionalTensor norm_bias, Tensor weight, double eps, std::string norm,
                              std::int64_t needs, bool tf32);

WithSaved linear_residual_fwd(Tensor x, Tensor weight, OptionalTensor bias, Tensor residual,
                              OptionalTensor layer_scale, OptionalTensor sample_scale, bool save, bool with_moments,
                              bool tf32);
Tensors linear_residual_bwd(Tensor grad, Tensor x, Tensors saved, Tensor weight, OptionalTensor layer_scale,
                            OptionalTensor sample_scale, std::int64_t needs, bool tf32);

WithSaved layer_norm_mlp_fwd(Tensor x, OptionalTensor norm_weight, OptionalTensor norm_bias, Tensor fc1_weight,
                             OptionalTensor fc1_bias, Tensor fc2_weight, OptionalTensor fc2_bias,
                             OptionalTensor gate_weight, OptionalTensor gate_bias,
                             OptionalTensor inner_norm_weight, OptionalTensor inner_norm_bias,
                             OptionalTensor layer_scale, OptionalTensor sample_scale, double eps,
                             std::string activation, std::string norm, Tensors folded, OptionalTensor moments, bool save,
                             bool with_moments, bool fused, bool tf32);
Tensors layer_norm_mlp_bwd(Tensor grad, Tensor x, Tensors saved, OptionalTensor norm_weight,
                           OptionalTensor norm_bias, Tensor fc1_weight, Tensor fc2_weight,
                           OptionalTensor gate_weight, OptionalTensor inner_norm_weight, OptionalTensor inner_norm_bias,
                           OptionalTensor layer_scale, OptionalTensor sample_scale, double eps,
                           std::string activation, std::string norm, std::int64_t needs, bool fused, bool tf32);

// On a CPU alone, forward, float32: softmax(scale q k^T + mask) v of q [B, H, N, d], k and v [B, H, M, d], as
// [B, N, H, d]. The mask [B, H, N, M], of any strides, is added; a row without a key gives zeros.
Tensor attention_fwd(Tensor q, Tensor k, Tensor v, OptionalTensor mask, bool causal, double scale);

}  // namespace fastvit
