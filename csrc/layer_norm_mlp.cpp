// The MLP half of a block: norm2, fc1, activation, a norm inside or none, fc2, LayerScale, residual.
//
// Saved for backward: mean and rstd of the norm, fc1's output (and the gate's) before the activation, mean and rstd
// of the norm inside, and beside LayerScale fc2's output. Normalised rows and activation are computed again.
#include "branch.h"
#include "needs.h"
#include "scope.h"

namespace fastvit {
namespace {

Activation activation_named(const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "quick_gelu") return Activation::kQuickGelu;
  if (name == "silu" || name == "swiglu") return Activation::kSilu;
  STD_TORCH_CHECK(name == "relu", "layer_norm_mlp: unknown activation ", name);
  return Activation::kRelu;
}

// What the activation takes: fc1's output, or its two halves, or two outputs.
struct Inputs {
  Tensor value;
  OptionalTensor gate;
  bool packed;
};

Inputs inputs_of(const Tensor& fc1, const OptionalTensor& gate, bool gated) {
  if (!gated || gate) return {fc1, gate, false};
  const std::int64_t half = fc1.size(1) / 2;
  Tensor both = fc1;
  return {torch::stable::narrow(both, 1, half, half), torch::stable::narrow(both, 1, 0, half), true};
}

}  // namespace

WithSaved layer_norm_mlp_fwd(Tensor x, OptionalTensor norm_weight, OptionalTensor norm_bias, Tensor fc1_weight,
                             OptionalTensor fc1_bias, Tensor fc2_weight, OptionalTensor fc2_bias,
                             OptionalTensor gate_weight, OptionalTensor gate_bias,
                             OptionalTensor inner_norm_weight, OptionalTensor inner_norm_bias,
                             OptionalTensor layer_scale, OptionalTensor sample_scale, double eps,
                             std::string activation, std::string norm, Tensors folded, OptionalTensor moments, bool save,
                             bool with_moments, bool fused, bool tf32) {
  const Scope scope("layer_norm_mlp", x, fc1_weight);
  const Activation act = activation_named(activation);
  const bool rms = norm == "rms_norm", gated = activation == "swiglu";
  const ScalarType dtype = fc1_weight.scalar_type();
  const Tensor residual = as_rows(x);
  const Norm outer{norm_weight, norm_bias, rms, eps};
  Tensors saved;

  Tensor a;
  if (auto one = gated || save ? std::nullopt : folded_linear(residual, outer, folded, act, moments)) {
    a = *one;
  } else if (const Normalized h = norm_rows(residual, outer, dtype, moments); gated) {
    const Tensor fc1 = linear(h.rows, fc1_weight, fc1_bias, tf32);
    OptionalTensor own_gate;
    if (gate_weight) own_gate = linear(h.rows, *gate_weight, gate_bias, tf32);
    const Inputs in = inputs_of(fc1, own_gate, gated);
    a = activate(in.value, in.gate, act);
    if (save) saved = present({h.mean, h.rstd, fc1, own_gate});
  } else {
    const Activated activated = linear_activated(h.rows, fc1_weight, fc1_bias, act, save, fused, tf32);
    a = activated.rows;
    if (save) saved = present({h.mean, h.rstd, activated.before});
  }
  if (inner_norm_weight) {
    const Normalized inner = norm_rows(a, {inner_norm_weight, inner_norm_bias, rms, eps}, dtype);
    a = inner.rows;
    if (save) saved.insert(saved.end(), {inner.mean, inner.rstd});
  }
  const BranchEnd end =
      branch_end(a, fc2_weight, fc2_bias, residual, layer_scale, sample_scale, save, with_moments, tf32);
  for (const OptionalTensor& beside : {end.product, end.moments}) {
    if (beside) saved.push_back(*beside);
  }
  return {shaped_like(x, end.out), saved};
}

Tensors layer_norm_mlp_bwd(Tensor grad, Tensor x, Tensors saved, OptionalTensor norm_weight,
                           OptionalTensor norm_bias, Tensor fc1_weight, Tensor fc2_weight,
                           OptionalTensor gate_weight, OptionalTensor inner_norm_weight, OptionalTensor inner_norm_bias,
                           OptionalTensor layer_scale, OptionalTensor sample_scale, double eps,
                           std::string activation, std::string norm, std::int64_t needs, bool fused, bool tf32) {
  const Scope scope("layer_norm_mlp's gradient", x, fc1_weight);
  Needs next(needs);
  const bool needs_x = next.next(), needs_norm_weight = next.next(), needs_norm_bias = next.next();
  const bool needs_fc1_weight = next.next(), needs_fc1_bias = next.next();
  const bool needs_fc2_weight = next.next(), needs_fc2_bias = next.next();
  const bool needs_gate_weight = next.next(), needs_gate_bias = next.next();
  const bool needs_inner_weight = next.next(), needs_inner_bias = next.next(), needs_scale = next.next();
  const bool needs_norm = needs_x || needs_norm_weight || needs_norm_bias;
  const bool needs_fc1 = needs_norm || needs_fc1_weight || needs_fc1_bias || needs_gate_weight || needs_gate_bias;
  const bool needs_inner = needs_inner_weight || needs_inner_bias;

  const Activation act = activation_named(activation);
  const bool rms = norm == "rms_norm", gated = activation == "swiglu";
  const ScalarType dtype = fc1_weight.scalar_type();
  const Norm outer{norm_weight, norm_bias, rms, eps}, within{inner_norm_weight, inner_norm_bias, rms, eps};
  const Tensor rows = as_rows(x);
  OptionalTensor product;
  if (layer_scale) {
    product = saved.back();
    saved.pop_back();
  }
  const Inputs in =
      inputs_of(saved[2], gate_weight ? OptionalTensor(saved[3]) : std::nullopt, gated);

  // From the output to the activation, which is needed again for fc2's gradient.
  const BranchGradient end =
      branch_gradient(grad, product, layer_scale, sample_scale, dtype, needs_scale);
  OptionalTensor da, fc2_input, dfc1, dgate, dfc1_bias;
  NormGradients inner;
  const bool through_activation_alone = needs_fc1 && !gated && !inner_norm_weight;
  if (through_activation_alone) {
    const ActivatedGradients one =
        linear_activated_backward(end.product, fc2_weight, in.value, act, needs_fc1_bias, fused, tf32);
    dfc1 = one.before;
    fc2_input = one.activated;
    dfc1_bias = one.bias;
  } else if (needs_fc1 || needs_inner) {
    da = linear_input_gradient(end.product, fc2_weight, tf32);
  }
  if (inner_norm_weight) {
    const Tensor a = activate(in.value, in.gate, act);
    const Tensor mean = saved[saved.size() - 2], rstd = saved[saved.size() - 1];
    fc2_input = renorm_rows(a, mean, rstd, within, dtype);
    if (da) {
      inner = norm_rows_backward(*da, a, mean, rstd, within, std::nullopt, needs_fc1, needs_inner_weight,
                                 needs_inner_bias);
      da = inner.x;
    }
  }
  if (needs_fc1 && !dfc1) {
    const ActivationGradients both = activate_backward(*da, in.value, in.gate, act, in.packed);
    dfc1 = both.value;
    dgate = both.gate;
    if (!fc2_input) fc2_input = both.activated;
  } else if (!fc2_input) {
    fc2_input = activate(in.value, in.gate, act);
  }
  const LinearGradients fc2 =
      branch_weight_gradients(end.product, *fc2_input, needs_fc2_weight, needs_fc2_bias, tf32);
  fc2_input.reset();
  da.reset();

  // From the activation to the normalised rows, which are computed again for the gradients of fc1 and its gate.
  LinearGradients fc1, gate;
  NormGradients before;
  const bool bias_too = needs_fc1_bias && !dfc1_bias;
  const bool fc1_too = needs_fc1_weight || bias_too, gate_too = needs_gate_weight || needs_gate_bias;
  if (fc1_too || gate_too) {
    const Tensor h = renorm_rows(rows, saved[0], saved[1], outer, dtype);
    if (fc1_too) fc1 = linear_weight_gradients(*dfc1, h, needs_fc1_weight, bias_too, tf32);
    if (gate_too) gate = linear_weight_gradients(*dgate, h, needs_gate_weight, needs_gate_bias, tf32);
  }
  if (dfc1_bias) fc1.bias = dfc1_bias;
  if (needs_norm) {
    Tensor dh = linear_input_gradient(*dfc1, fc1_weight, tf32);
    if (gate_weight) dh = add_scaled(dh, linear_input_gradient(*dgate, *gate_weight, tf32), {}, {});
    before = norm_rows_backward(dh, rows, saved[0], saved[1], outer,
                                needs_x ? OptionalTensor(as_rows(grad)) : std::nullopt, needs_x,
                                needs_norm_weight, needs_norm_bias);
    if (before.x) before.x = shaped_like(x, *before.x);
  }
  return present({before.x, before.weight, before.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias, gate.weight,
                  gate.bias, inner.weight, inner.bias, end.layer_scale});
}

}  // namespace fastvit
