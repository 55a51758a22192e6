// See row_loops.h. FASTVIT_LEVEL names the vector instructions that this compilation may use. No sum's order
// depends on them.
#include "row_loops.h"

#include <cmath>

#include "activations.h"
#include "brain_float.h"
#include "row_norm.h"

#define FASTVIT_SIMD _Pragma("omp simd")

namespace fastvit::FASTVIT_LEVEL {
namespace {

// The sum of term(i) in sixty-four chains, which are short and fill vectors of any width.
template <typename Wide, typename Term>
Wide sum_of(Size count, Term term) {
  constexpr Size lanes = 64;
  Wide held[lanes] = {};
  Size i = 0;
  for (; i + lanes <= count; i += lanes) {
    FASTVIT_SIMD
    for (Size lane = 0; lane < lanes; ++lane) held[lane] += term(i + lane);
  }
  for (Size lane = 0; i < count; ++i, ++lane) held[lane] += term(i);
  for (Size half = lanes / 2; half > 0; half /= 2) {
    for (Size lane = 0; lane < half; ++lane) held[lane] += held[lane + half];
  }
  return held[0];
}

template <typename In, typename Out>
struct Loops {
  using Wide = wide_t<Out>;
  using OneGelu = std::conditional_t<std::is_same_v<Out, BrainFloat>, GeluHalf, Gelu>;

  static void norm(const void* x_, void* out_, void* mean_, void* rstd_, const NormArrays& norm, Size rows,
                   Size cols) {
    auto* mean = static_cast<Wide*>(mean_);
    auto* rstd = static_cast<Wide*>(rstd_);
    for (Size row = 0; row < rows; ++row) {
      const In* x = static_cast<const In*>(x_) + row * cols;
      Out* out = static_cast<Out*>(out_) + row * cols;
      Wide first = 0;
      if (!norm.rms) first = sum_of<Wide>(cols, [=](Size i) { return widen(x[i]); }) / cols;
      const auto off_by = [=](Size i) { return widen(x[i]) - first; };
      const Wide off = sum_of<Wide>(cols, off_by);
      const Wide squares = sum_of<Wide>(cols, [=](Size i) { return off_by(i) * off_by(i); });
      const RowStatistics<Wide> row_is = row_statistics(first, off, squares, RowWidth<Wide>(cols), Wide(norm.eps), norm.rms);
      if (!norm.rms) mean[row] = row_is.mean();
      rstd[row] = row_is.rstd;
      write(x, out, row_is, norm, cols);
    }
  }

  static void renorm(const void* x_, void* out_, const void* mean_, const void* rstd_, const NormArrays& norm,
                     Size rows, Size cols) {
    for (Size row = 0; row < rows; ++row) {
      const Wide mean = norm.rms ? Wide(0) : static_cast<const Wide*>(mean_)[row];
      const RowStatistics<Wide> row_is{mean, Wide(0), static_cast<const Wide*>(rstd_)[row]};
      write(static_cast<const In*>(x_) + row * cols, static_cast<Out*>(out_) + row * cols, row_is, norm, cols);
    }
  }

  // The affine part's four cases are loops of their own, for vectors without a test inside.
  static void write(const In* x, Out* out, const RowStatistics<Wide>& row_is, const NormArrays& norm, Size cols) {
    const Wide* weight = static_cast<const Wide*>(norm.weight);
    const Wide* bias = static_cast<const Wide*>(norm.bias);
    if (weight && bias) {
      FASTVIT_SIMD
      for (Size i = 0; i < cols; ++i) store(out[i], row_is.apply(widen(x[i])) * weight[i] + bias[i]);
    } else if (weight) {
      FASTVIT_SIMD
      for (Size i = 0; i < cols; ++i) store(out[i], row_is.apply(widen(x[i])) * weight[i]);
    } else {
      FASTVIT_SIMD
      for (Size i = 0; i < cols; ++i) store(out[i], row_is.apply(widen(x[i])));
    }
  }

  static void norm_backward(const void* grad_, const void* x_, const void* mean_, const void* rstd_,
                            const NormArrays& norm, const void* beside_, void* dx_, void* weight_sum_,
                            void* bias_sum_, Size rows, Size cols) {
    const Wide* weight = static_cast<const Wide*>(norm.weight);
    for (Size row = 0; row < rows; ++row) {
      const Out* grad = static_cast<const Out*>(grad_) + row * cols;
      const In* x = static_cast<const In*>(x_) + row * cols;
      const Wide mean = norm.rms ? Wide(0) : static_cast<const Wide*>(mean_)[row];
      const RowStatistics<Wide> row_is{mean, Wide(0), static_cast<const Wide*>(rstd_)[row]};
      if (auto* sum = static_cast<Wide*>(weight_sum_)) {
        FASTVIT_SIMD
        for (Size i = 0; i < cols; ++i) sum[i] += widen(grad[i]) * row_is.apply(widen(x[i]));
      }
      if (auto* sum = static_cast<Wide*>(bias_sum_)) {
        FASTVIT_SIMD
        for (Size i = 0; i < cols; ++i) sum[i] += widen(grad[i]);
      }
      if (!dx_) continue;
      const auto scaled = [=](Size i) { return weight ? widen(grad[i]) * weight[i] : widen(grad[i]); };
      const Wide sum = sum_of<Wide>(cols, scaled);
      const Wide product =
          sum_of<Wide>(cols, [=](Size i) { return scaled(i) * row_is.apply(widen(x[i])); });
      const RowSlope<Wide> slope = row_slope(sum, product, RowWidth<Wide>(cols), row_is.rstd, norm.rms);
      In* dx = static_cast<In*>(dx_) + row * cols;
      const In* beside = beside_ ? static_cast<const In*>(beside_) + row * cols : nullptr;
      FASTVIT_SIMD
      for (Size i = 0; i < cols; ++i) {
        const Wide g = weight ? widen(grad[i]) * weight[i] : widen(grad[i]);
        const Wide own = slope.apply(g, row_is.apply(widen(x[i])));
        store(dx[i], beside ? own + widen(beside[i]) : own);
      }
    }
  }

  static void add_scaled(const void* residual_, const void* y_, void* out_, const void* scale_, double factor_,
                         Size rows, Size cols) {
    const Wide* scale = static_cast<const Wide*>(scale_);
    const Wide factor = static_cast<Wide>(factor_);
    for (Size row = 0; row < rows; ++row) {
      const In* residual = static_cast<const In*>(residual_) + row * cols;
      const Out* y = static_cast<const Out*>(y_) + row * cols;
      In* out = static_cast<In*>(out_) + row * cols;
      FASTVIT_SIMD
      for (Size i = 0; i < cols; ++i) {
        const Wide branch = (scale ? scale[i] * widen(y[i]) : widen(y[i])) * factor;
        store(out[i], widen(residual[i]) + branch);
      }
    }
  }

  static void scale(const void* x_, void* out_, const void* scale_, double factor_, Size rows, Size cols) {
    const Wide* scale = static_cast<const Wide*>(scale_);
    const Wide factor = static_cast<Wide>(factor_);
    for (Size row = 0; row < rows; ++row) {
      const In* x = static_cast<const In*>(x_) + row * cols;
      Out* out = static_cast<Out*>(out_) + row * cols;
      FASTVIT_SIMD
      for (Size i = 0; i < cols; ++i) store(out[i], (scale ? scale[i] * widen(x[i]) : widen(x[i])) * factor);
    }
  }

  template <typename Function>
  static void activate_with(const void* value_, const void* gate_, void* out_, Size rows, Size cols,
                            Size stride) {
    for (Size row = 0; row < rows; ++row) {
      const Out* value = static_cast<const Out*>(value_) + row * stride;
      Out* out = static_cast<Out*>(out_) + row * cols;
      if (gate_) {
        const Out* gate = static_cast<const Out*>(gate_) + row * stride;
        FASTVIT_SIMD
        for (Size i = 0; i < cols; ++i) store(out[i], Function::value(widen(gate[i])) * widen(value[i]));
      } else {
        FASTVIT_SIMD
        for (Size i = 0; i < cols; ++i) store(out[i], Function::value(widen(value[i])));
      }
    }
  }

  // Gradients lie as the values do, `stride` apart.
  template <typename Function>
  static void activate_backward_with(const void* grad_, const void* value_, const void* gate_, void* dvalue_,
                                     void* dgate_, void* activated_, Size rows, Size cols, Size stride) {
    for (Size row = 0; row < rows; ++row) {
      const Out* grad = static_cast<const Out*>(grad_) + row * cols;
      const Out* value = static_cast<const Out*>(value_) + row * stride;
      Out* dvalue = static_cast<Out*>(dvalue_) + row * stride;
      Out* activated = static_cast<Out*>(activated_) + row * cols;
      if (gate_) {
        const Out* gate = static_cast<const Out*>(gate_) + row * stride;
        Out* dgate = static_cast<Out*>(dgate_) + row * stride;
        FASTVIT_SIMD
        for (Size i = 0; i < cols; ++i) {
          Wide slope;
          const Wide g = widen(grad[i]), v = widen(value[i]), a = Function::both(widen(gate[i]), slope);
          store(activated[i], a * v);
          store(dvalue[i], g * a);
          store(dgate[i], g * v * slope);
        }
      } else {
        FASTVIT_SIMD
        for (Size i = 0; i < cols; ++i) {
          Wide slope;
          store(activated[i], Function::both(widen(value[i]), slope));
          store(dvalue[i], widen(grad[i]) * slope);
        }
      }
    }
  }

  static void activate(const void* value, const void* gate, void* out, Activation activation, Size rows,
                       Size cols, Size stride) {
    choose_activation<OneGelu>(activation, [&](auto function) {
      activate_with<decltype(function)>(value, gate, out, rows, cols, stride);
    });
  }

  static void activate_backward(const void* grad, const void* value, const void* gate, void* dvalue, void* dgate,
                                void* activated, Activation activation, Size rows, Size cols, Size stride) {
    choose_activation<OneGelu>(activation, [&](auto function) {
      activate_backward_with<decltype(function)>(grad, value, gate, dvalue, dgate, activated, rows, cols, stride);
    });
  }

  // Rows are added by fours, which makes the chain of additions a quarter as long.
  template <typename Term>
  static void sum_terms(void* sum_, Size rows, Size cols, Term term) {
    Wide* sum = static_cast<Wide*>(sum_);
    Size row = 0;
    for (; row + 4 <= rows; row += 4) {
      FASTVIT_SIMD
      for (Size i = 0; i < cols; ++i) {
        sum[i] += (term(row, i) + term(row + 1, i)) + (term(row + 2, i) + term(row + 3, i));
      }
    }
    for (; row < rows; ++row) {
      FASTVIT_SIMD
      for (Size i = 0; i < cols; ++i) sum[i] += term(row, i);
    }
  }

  static void sum_products(const void* a_, const void* b_, void* sum, Size rows, Size cols) {
    const Out *a = static_cast<const Out*>(a_), *b = static_cast<const Out*>(b_);
    sum_terms(sum, rows, cols,
              [=](Size row, Size i) { return widen(a[row * cols + i]) * widen(b[row * cols + i]); });
  }

  static void sum_rows(const void* x_, void* sum, Size rows, Size cols) {
    const Out* x = static_cast<const Out*>(x_);
    sum_terms(sum, rows, cols, [=](Size row, Size i) { return widen(x[row * cols + i]); });
  }

  // By tiles that a level-one cache holds; a tile's reads are whole lines, and so are its writes.
  static void transpose(const void* x_, void* out_, Size rows, Size cols, Size first, Size count) {
    constexpr Size tile = 128 / sizeof(Out);
    const Out* x = static_cast<const Out*>(x_);
    Out* out = static_cast<Out*>(out_);
    const Size last = first + count;
    for (Size i0 = first; i0 < last; i0 += tile) {
      for (Size j0 = 0; j0 < rows; j0 += tile) {
        const Size i1 = i0 + tile < last ? i0 + tile : last, j1 = j0 + tile < rows ? j0 + tile : rows;
        for (Size i = i0; i < i1; ++i) {
          for (Size j = j0; j < j1; ++j) out[i * rows + j] = x[j * cols + i];
        }
      }
    }
  }

  static constexpr RowLoops table = {norm,     renorm,            norm_backward, add_scaled, scale,
                                     activate, activate_backward, sum_products,  sum_rows,   transpose};
};

}  // namespace

const RowLoops* row_loops(ScalarType input, ScalarType output) {
  if (output == ScalarType::BFloat16) {
    return input == ScalarType::Float ? &Loops<float, BrainFloat>::table : &Loops<BrainFloat, BrainFloat>::table;
  }
  return output == ScalarType::Double ? &Loops<double, double>::table : &Loops<float, float>::table;
}

}  // namespace fastvit::FASTVIT_LEVEL
