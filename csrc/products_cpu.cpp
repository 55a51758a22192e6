// products.h on a CPU. In float32 panels.h's product or, with AVX-512, oneDNN's through torch; oneDNN in bfloat16; ATen
// in float64, which neither has, and for a few rows, where MKL's products are more exact.
//
// torch itself calls MKL for float32. oneDNN is faster there, takes transposed operands as they are, packed
// weights, and an activation or a residual in its epilogue; of such, LayerScale, and a slice of an output to write
// to, it has nothing, and panels.h has all.
#include <algorithm>
#include <array>
#include <cstdlib>

#include "panels.h"
#include "products.h"
#include "row_loops.h"
#include "scope.h"
#include "shares.h"

// It hands on what torch itself said of an error, which in 2.11 no macro does.
#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace fastvit {
namespace {

using torch::stable::detail::from;

template <std::size_t N>
Tensor call(const char* op, const char* overload, std::array<StableIValue, N> arguments) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, arguments.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(arguments[0]);
}

// What torch's own kernels go by, which a user may set lower than what the CPU has.
bool has_wide_vectors() {
#if defined(FASTVIT_LEVELS)
  static const bool has = [] {
    const char* told = std::getenv("ATEN_CPU_CAPABILITY");
    return __builtin_cpu_supports("x86-64-v4") && (told == nullptr || std::string(told) == "avx512");
  }();
  return has;
#else
  return false;
#endif
}

void multiply_panels(const PanelProduct& product, const PanelShare& share) {
#if defined(FASTVIT_LEVELS)
  static const auto narrow = __builtin_cpu_supports("x86-64-v3") ? v3::multiply_panels : base::multiply_panels;
  has_wide_vectors() && !product.in_panels ? v4::multiply_panels(product, share) : narrow(product, share);
#else
  base::multiply_panels(product, share);
#endif
}

// Blocks of whole strips, as even as they can be, by a few panels at a time.
void multiply_panels(const PanelProduct& product) {
  constexpr std::int64_t most = 6;  // times kShareColumns, by which what is read of x pays, sums still in a near cache
  const auto divide = [](std::int64_t whole, std::int64_t part) { return (whole + part - 1) / part; };
  const std::int64_t columns = divide(product.width, kShareColumns), threads = torch::stable::get_num_threads();
  const std::int64_t blocks = divide(product.rows, kPanelRows);
  const std::int64_t rows = divide(divide(product.rows, kShareRows), blocks) * kShareRows;
  const std::int64_t together = std::clamp<std::int64_t>(columns * blocks / (threads * kSharesAThread), 1, most);
  const std::int64_t parts = divide(columns, together);
  share_out(blocks * parts, [&](std::int64_t share, std::int64_t) {
    const std::int64_t row = share / parts * rows, part = share % parts;
    multiply_panels(product, {row, std::min(rows, product.rows - row), part * columns / parts * kShareColumns,
                              std::min((part + 1) * columns / parts * kShareColumns, product.width)});
  });
}

// oneDNN takes rows or columns of a weight one after the other, and of a bias no strides.
Tensor dense(const Tensor& weight) {
  if (weight.layout() != torch::headeronly::Layout::Strided) return weight;
  return weight.stride(0) == 1 || weight.stride(1) == 1 ? weight : packed(weight);
}

OptionalTensor dense(const OptionalTensor& bias) {
  return bias ? OptionalTensor(packed(*bias)) : bias;
}

// x weight^T + bias, then oneDNN's `post`: "none", "gelu" (of which `form` is "none" for erf, or "tanh"), ...
Tensor onednn(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const char* post = "none",
              const char* form = "") {
  return call("mkldnn::_linear_pointwise", "",
              std::array{from(x), from(dense(weight)), from(dense(bias)), from(std::string(post)),
                         from(std::vector<std::optional<double>>{}),
                         from(std::optional<std::string>(form))});
}

Tensor transposed(const Tensor& x) { return torch::stable::transpose(x, 0, 1); }

constexpr std::int64_t kFewRows = 16;

// Without instructions for bfloat16 oneDNN refuses weights that are packed, and is slower than ATen.
bool multiplies_bfloat16() {
  static const bool can = [] {
    std::array<StableIValue, 1> result{};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("mkldnn::_is_mkldnn_bf16_supported", "", result.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<bool>(result[0]);
  }();
  return can;
}

bool is_onednn(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  if (dtype == ScalarType::Double || (dtype == ScalarType::BFloat16 && !multiplies_bfloat16())) return false;
  return x.size(0) > kFewRows && x.size(1) != 0;
}

bool has_panels(const Tensor& weight) { return weight.dim() == 3; }

// Whether the product of panels.h takes the weight: in panels, or as it is.
bool is_own(const Tensor& x, const Tensor& weight) {
  if (has_panels(weight)) return true;
  if (x.scalar_type() != ScalarType::Float || weight.layout() != torch::headeronly::Layout::Strided) return false;
  return x.size(0) > kFewRows && x.size(1) != 0 && weight.stride(1) == 1;
}

// And whether it is the fastest: with AVX-512 oneDNN's is as fast.
bool is_best(const Tensor& x, const Tensor& weight) {
  return is_own(x, weight) && (has_panels(weight) || !has_wide_vectors());
}

// What panels.h does beside the product, each of it or none.
struct Beside {
  OptionalTensor bias, scale, residual;
  std::optional<Activation> activation;
};

void multiply_into(Tensor out, const Tensor& x, const Tensor& weight, const Beside& beside) {
  if (out.numel() == 0) return;
  const bool in_panels = has_panels(weight);
  const auto ready = [](const OptionalTensor& t) {
    return t ? OptionalTensor(packed(as_dtype(*t, ScalarType::Float))) : t;
  };
  const Tensor rows = packed(x), matrix = in_panels ? packed(weight) : weight;
  const OptionalTensor bias = ready(beside.bias), scale = ready(beside.scale), residual = ready(beside.residual);
  const auto floats = [](const OptionalTensor& t) {
    return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
  };
  multiply_panels({floats(rows), floats(matrix), floats(bias), floats(scale), floats(residual),
                   static_cast<float*>(out.mutable_data_ptr()), out.size(0), x.size(1), out.size(1),
                   in_panels ? 0 : matrix.stride(0), out.stride(0), in_panels, beside.activation});
}

Tensor multiply(const Tensor& x, const Tensor& weight, const Beside& beside) {
  Tensor out = empty_beside(x, {x.size(0), outputs_of(weight)}, ScalarType::Float);
  multiply_into(out, x, weight, beside);
  return out;
}

// x weight^T + bias, whatever the dtype and the strides.
Tensor product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  if (is_best(x, weight)) return multiply(x, weight, {bias, {}, {}, {}});
  if (is_onednn(x)) return onednn(x, weight, bias);
  return call("aten::linear", "", std::array{from(x), from(weight), from(bias)});
}

// a^T b. Of float32 oneDNN takes a transposed second operand as it is, but would copy the first, and slowly;
// for the rest torch's own product has no copy either.
Tensor outer_product(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() == ScalarType::Float && a.size(0) > kFewRows) {
    return product(transpose_rows(a), transposed(b), {});
  }
  return call("aten::mm", "", std::array{from(transposed(a)), from(b)});
}

struct Post {
  const char *name, *form;
};

// What of the activations oneDNN has. Its ReLU makes nan 0, where torch's keeps it.
std::optional<Post> post_for(Activation activation) {
  switch (activation) {
    case Activation::kGelu:
      return Post{"gelu", "none"};
    case Activation::kGeluTanh:
      return Post{"gelu", "tanh"};
    case Activation::kSilu:
      return Post{"swish", ""};
    default:
      return std::nullopt;
  }
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool) {
  return product(x, weight, bias);
}

void linear_into(Tensor out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool) {
  if (is_own(x, weight)) return multiply_into(out, x, weight, {bias, {}, {}, {}});
  torch::stable::copy_(out, product(x, weight, bias));
}

Tensor linear_add(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& layer_scale,
                  const Tensor& residual, bool) {
  const bool wide = residual.scalar_type() != x.scalar_type();
  if (!wide && (layer_scale ? is_own(x, weight) : is_best(x, weight))) {
    return multiply(x, weight, {bias, layer_scale, residual, {}});
  }
  if (wide || layer_scale || !is_onednn(x)) return add_scaled(residual, product(x, weight, bias), layer_scale, {});
  return call("mkldnn::_linear_pointwise", "binary",
              std::array{from(x), from(residual), from(dense(weight)), from(dense(bias)), from(std::string("add"))});
}

WithMoments linear_add_with_moments(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                    const OptionalTensor& layer_scale, const Tensor& residual, bool tf32) {
  const Tensor out = linear_add(x, weight, bias, layer_scale, residual, tf32);
  return {out, row_moments(out)};
}

Activated linear_activated(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                           Activation activation, bool keep_before, bool, bool) {
  const std::optional<Post> post = post_for(activation);
  if (!keep_before && (post ? is_best(x, weight) : is_own(x, weight))) {
    return {multiply(x, weight, {bias, {}, {}, activation}), {}};
  }
  if (post && !keep_before && is_onednn(x)) return {onednn(x, weight, bias, post->name, post->form), {}};
  const Tensor before = product(x, weight, bias);
  return {activate(before, {}, activation), keep_before ? OptionalTensor(before) : std::nullopt};
}

OptionalTensor folded_linear(const Tensor&, const Norm&, const std::vector<Tensor>&, std::optional<Activation>,
                             const OptionalTensor&) {
  return std::nullopt;
}

Tensor linear_input_gradient(const Tensor& grad, const Tensor& weight, bool) {
  return product(grad, transposed(weight), {});
}

ActivatedGradients linear_activated_backward(const Tensor& grad, const Tensor& weight, const Tensor& before,
                                             Activation activation, bool, bool, bool tf32) {
  const Tensor activated_gradient = linear_input_gradient(grad, weight, tf32);
  const ActivationGradients both = activate_backward(activated_gradient, before, {}, activation, false);
  return {both.value, both.activated, {}};
}

LinearGradients linear_weight_gradients(const Tensor& grad, const Tensor& x, bool needs_weight, bool needs_bias,
                                        bool) {
  LinearGradients gradients;
  if (needs_weight) gradients.weight = outer_product(grad, x);
  if (needs_bias) gradients.bias = sum_rows(grad);
  return gradients;
}

}  // namespace fastvit
