// The output projection with LayerScale, stochastic depth and the residual.
#include "branch.h"
#include "needs.h"
#include "scope.h"

namespace fastvit {

WithSaved linear_residual_fwd(Tensor x, Tensor weight, OptionalTensor bias, Tensor residual,
                              OptionalTensor layer_scale, OptionalTensor sample_scale, bool save, bool with_moments,
                              bool tf32) {
  const Scope scope("linear_residual", x, weight);
  const Tensor rows = as_dtype(as_rows(x), weight.scalar_type());
  const BranchEnd end =
      branch_end(rows, weight, bias, as_rows(residual), layer_scale, sample_scale, save, with_moments, tf32);
  return {shaped_like(residual, end.out), present({end.product, end.moments})};
}

Tensors linear_residual_bwd(Tensor grad, Tensor x, Tensors saved, Tensor weight, OptionalTensor layer_scale,
                            OptionalTensor sample_scale, std::int64_t needs, bool tf32) {
  const Scope scope("linear_residual's gradient", x, weight);
  Needs next(needs);
  const bool needs_x = next.next(), needs_weight = next.next(), needs_bias = next.next();
  const bool needs_scale = next.next();

  const OptionalTensor product = layer_scale ? OptionalTensor(saved[0]) : std::nullopt;
  const BranchGradient end =
      branch_gradient(grad, product, layer_scale, sample_scale, weight.scalar_type(), needs_scale);
  OptionalTensor dx;
  if (needs_x) {
    const Tensor rows = linear_input_gradient(end.product, weight, tf32);
    dx = shaped_like(x, as_dtype(rows, x.scalar_type()));
  }
  const Tensor rows = as_dtype(as_rows(x), weight.scalar_type());
  const LinearGradients own = branch_weight_gradients(end.product, rows, needs_weight, needs_bias, tf32);
  return present({dx, own.weight, own.bias, end.layer_scale});
}

}  // namespace fastvit
