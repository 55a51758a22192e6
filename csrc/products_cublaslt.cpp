// The matrix products by cuBLASLt, whose matrices are column-major: a row-major [r, c] is its [c, r] without a
// copy, so that each product is the transposed one, d^T = (a b)^T = b^T a^T.
//
//   row-major                    column-major d   op(a) [m, k]                 op(b) [k, n]
//   out [T, D] = x [T, K] W^T    out^T [D, T]     W   [D, K]: W [K, D] as T    x^T    [K, T]: x as N
//   dx  [T, K] = grad [T, D] W   dx^T  [K, T]     W^T [K, D]: W [K, D] as N    grad^T [D, T]: grad as N
//   dW  [D, K] = grad^T x        dW^T  [K, D]     x^T [K, T]: x [K, T] as N    grad   [T, D]: grad as T
//
// The bias [D] runs along the rows of out^T (m), as BIAS has it. The sum of grad over T is over the k of dW^T and
// runs along its columns (n), as BGRADB has it.
#include "cublaslt.h"
#include "fused_products.h"
#include "launch_cuda.h"

namespace fastvit {
namespace {

Product forward_product(const Tensor& x, const Tensor& weight, ScalarType out, bool tf32) {
  return {weight.size(0), x.size(0), x.size(1), true, false, x.scalar_type(), out, tf32};
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool tf32) {
  Tensor out = empty_beside(x, {x.size(0), weight.size(0)}, x.scalar_type());
  linear_into(out, x, weight, bias, tf32);
  return out;
}

void linear_into(Tensor out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool tf32) {
  if (out.numel() == 0) return;
  const Tensor rows = packed(x), matrix = packed(weight);
  if (rows.size(1) == 0) {
    bias ? torch::stable::copy_(out, *bias) : torch::stable::zero_(out);
    return;
  }
  Product product = forward_product(rows, matrix, x.scalar_type(), tf32);
  product.d_stride = out.stride(0);
  Operands operands{matrix.data_ptr(), rows.data_ptr(), out.data_ptr()};
  if (bias) {
    const Tensor vector = packed(as_dtype(*bias, x.scalar_type()));
    product.epilogue = CUBLASLT_EPILOGUE_BIAS;
    operands.vector = vector.data_ptr();
    if (try_product(product, operands, x)) return;
    // Without that epilogue the product is added to rows of the bias.
    torch::stable::copy_(out, vector);
    product.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    product.adds_c = true;
    operands.c = operands.d;
  }
  run_product(product, operands, x);
}

Tensor linear_add(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& layer_scale,
                  const Tensor& residual, bool tf32) {
  const ScalarType dtype = residual.scalar_type();
  const Tensor rows = packed(x), matrix = packed(weight), around = packed(residual);
  if (!layer_scale && around.numel() > 0 && rows.size(1) > 0) {
    const Tensor out = empty_like_as(around, dtype);
    OptionalTensor vector;
    Product product = forward_product(rows, matrix, dtype, tf32);
    product.adds_c = true;
    Operands operands{matrix.data_ptr(), rows.data_ptr(), out.data_ptr(), around.data_ptr()};
    if (bias) {
      vector = packed(as_dtype(*bias, dtype));  // BIAS takes it in the type of out
      product.epilogue = CUBLASLT_EPILOGUE_BIAS;
      operands.vector = vector->data_ptr();
    }
    if (try_product(product, operands, x)) return out;
  }
  return add_scaled(around, linear(rows, matrix, bias, tf32), layer_scale, std::nullopt);
}

WithMoments linear_add_with_moments(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                    const OptionalTensor& layer_scale, const Tensor& residual, bool tf32) {
  if (auto one = fused_residual(x, weight, bias, layer_scale, residual)) return *one;
  const Tensor out = linear_add(x, weight, bias, layer_scale, residual, tf32);
  return {out, row_moments(out)};
}

// The portable form is the product, then the activation in a pass of its own.
Activated linear_activated(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                           Activation activation, bool keep_before, bool fused, bool tf32) {
  if (fused) {
    if (auto one = fused_activated(x, weight, bias, activation, keep_before)) return *one;
  }
  const Tensor before = linear(x, weight, bias, tf32);
  if (keep_before) return {activate(before, std::nullopt, activation), before};
  activate_in_place(before, activation);
  return {before, std::nullopt};
}

Tensor linear_input_gradient(const Tensor& grad, const Tensor& weight, bool tf32) {
  const std::int64_t rows = grad.size(0), outputs = grad.size(1), inputs = weight.size(1);
  Tensor dx = empty_beside(grad, {rows, inputs}, grad.scalar_type());
  if (dx.numel() == 0) return dx;
  if (outputs == 0) return torch::stable::zero_(dx);
  const Tensor incoming = packed(grad), matrix = packed(weight);
  const ScalarType dtype = grad.scalar_type();
  run_product({inputs, rows, outputs, false, false, dtype, dtype, tf32},
              {matrix.data_ptr(), incoming.data_ptr(), dx.data_ptr()}, grad);
  return dx;
}

ActivatedGradients linear_activated_backward(const Tensor& grad, const Tensor& weight, const Tensor& before,
                                             Activation activation, bool needs_bias, bool fused, bool tf32) {
  if (fused) {
    if (auto one = fused_activated_backward(grad, weight, before, activation, needs_bias)) return *one;
  }
  const Tensor activated_gradient = linear_input_gradient(grad, weight, tf32);
  const ActivationGradients both = activate_backward(activated_gradient, before, {}, activation, false);
  return {both.value, both.activated, {}};
}

LinearGradients linear_weight_gradients(const Tensor& grad, const Tensor& x, bool needs_weight, bool needs_bias,
                                        bool tf32) {
  const Tensor incoming = packed(grad), rows = packed(x);
  LinearGradients gradients;
  const ScalarType dtype = grad.scalar_type();
  const std::int64_t count = grad.size(0), outputs = grad.size(1), inputs = x.size(1);
  if (needs_weight) {
    Tensor dw = empty_beside(grad, {outputs, inputs}, dtype);
    gradients.weight = dw;
    Product product{inputs, outputs, count, false, true, dtype, dtype, tf32};
    Operands operands{rows.data_ptr(), incoming.data_ptr(), dw.data_ptr()};
    if (count == 0) {
      torch::stable::zero_(dw);
    } else if (dw.numel() > 0) {
      // In float32 the bias's gradient is to be exact, whatever the product does with its operands.
      if (needs_bias && dtype != ScalarType::Float) {
        const Tensor db = empty_beside(grad, {outputs}, dtype);
        Product with_bias = product;
        with_bias.epilogue = CUBLASLT_EPILOGUE_BGRADB;
        operands.vector = db.data_ptr();
        if (try_product(with_bias, operands, grad)) {
          gradients.bias = db;
          return gradients;
        }
        operands.vector = nullptr;
      }
      run_product(product, operands, grad);
    }
  }
  if (needs_bias) gradients.bias = sum_rows(incoming);
  return gradients;
}

}  // namespace fastvit
