// The output projection with LayerScale, stochastic depth and the residual.
#include "branch.h"
#include "needs.h"
#include "scope.h"

namespace fastvit {

WithSaved linear_residual_fwd(Tensor x, Tensor weight, OptionalTensor bias, Tensor residual,
                              OptionalTensor layer_scale, OptionalTensor sample_scale, bool tf32) {
  const Scope scope("linear_residual", x, weight);
  const Tensor rows = as_dtype(as_rows(x), weight.scalar_type());
  const Tensor out = branch_end(rows, weight, bias, as_rows(residual), layer_scale, sample_scale, tf32);
  return {shaped_like(residual, out), {}};
}

Tensors linear_residual_bwd(Tensor grad, Tensor x, Tensor weight, OptionalTensor bias,
                            OptionalTensor layer_scale, OptionalTensor sample_scale, std::int64_t needs,
                            bool tf32) {
  const Scope scope("linear_residual's gradient", x, weight);
  Needs next(needs);
  const bool needs_x = next.next(), needs_weight = next.next(), needs_bias = next.next();
  const bool needs_scale = next.next();

  const Tensor dy = scale_samples(grad, sample_scale, weight.scalar_type());
  OptionalTensor dx;
  if (needs_x) {
    const Tensor rows = branch_input_gradient(dy, weight, layer_scale, tf32);
    dx = shaped_like(x, as_dtype(rows, x.scalar_type()));
  }
  const Tensor rows = as_dtype(as_rows(x), weight.scalar_type());
  const BranchGradients end = branch_weight_gradients(dy, rows, weight, bias, layer_scale, needs_weight,
                                                      needs_bias, needs_scale, tf32);
  return present({dx, end.weight, end.bias, end.layer_scale});
}

}  // namespace fastvit
