// LayerNorm and RMSNorm: a warp a row, statistics in float32. Their gradients are in norm_backward_cuda.cu.
//
// Where vectors fit a row and a lane can hold its share, the row is read once; any other is read again for each
// pass, from the caches. Without a mean (RMSNorm) the mean's pointer is null, and so is y where the statistics alone
// are wanted.
#include "row_kernels.cuh"
#include "row_norm.h"

namespace fastvit {
namespace {

template <typename In, typename Out, typename Parameter>
struct Forward {
  const In* x;
  const Parameter *weight, *bias;
  Out* y;
  float *mean, *rstd;
  std::int64_t rows, columns;
  RowWidth<float> width;
  float eps;

  template <int kWidth>
  bool fits() const {
    return vectors_fit<kWidth>(columns, x, weight, bias, y);
  }
};

// The row and what it is multiplied by, where that leaves registers to work with: the weight and the bias are then
// on their way while the row is summed.
template <typename Parameter, int kNumbers>
constexpr bool kHoldsAffine = kNumbers * (sizeof(float) + 2 * sizeof(Parameter)) <= 320;

template <typename Parameter, int kVectors, int kWidth>
using Affine = Row<Parameter, kHoldsAffine<Parameter, kVectors * kWidth> ? kVectors : 0, kWidth>;

template <int kWidth, typename Parameters, typename Out>
__device__ __forceinline__ void write_vector(float (&centred)[kWidth], const RowStatistics<float>& of,
                                             const Parameters& weights, const Parameters& biases, int i,
                                             std::int64_t column, Out* y) {
  float weight[kWidth], bias[kWidth];
  weights.get(i, column, weight);
  biases.get(i, column, bias);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) centred[j] = of.apply_centred(centred[j]) * weight[j] + bias[j];
  store_floats<kWidth>(y + column, centred);
}

template <int kVectors, int kWidth, typename In, typename Out, typename Parameter>
__global__ void __launch_bounds__(kThreads) norm_forward_kernel(Forward<In, Out, Parameter> a) {
  await_the_stream();
  const std::int64_t r = first_row();
  if (r >= a.rows) return;
  const Row<In, kVectors, kWidth> row(a.x + r * a.columns, a.columns);
  const Affine<Parameter, kVectors, kWidth> weights(a.weight, a.columns, 1.0f), biases(a.bias, a.columns, 0.0f);
  // What a lane holds is converted once, and centred where it lies.
  float held[kVectors > 0 ? kVectors : 1][kWidth];
  const auto get = [&](int i, std::int64_t column) {
    if constexpr (kVectors == 0) row.get(i, column, held[0]);
  };
  if constexpr (kVectors > 0) {
    each_vector<kVectors, kWidth>(a.columns, [&](int i, std::int64_t column) { row.get(i, column, held[i]); });
  }

  float about = 0.0f;
  if (a.mean != nullptr) {
    float sum = 0.0f;
    each_vector<kVectors, kWidth>(a.columns, [&](int i, std::int64_t column) {
      get(i, column);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum += held[i][j];
    });
    about = a.width.mean_of(warp_sum(sum));
  }
  // The first mean is rounded, which shows where it is large beside the deviation: what is left of the mean
  // among the centred numbers is taken out of them and of their squares.
  float sum = 0.0f, squares = 0.0f;
  each_vector<kVectors, kWidth>(a.columns, [&](int i, std::int64_t column) {
    get(i, column);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      held[i][j] -= about;
      sum += held[i][j];
      squares += held[i][j] * held[i][j];
    }
  });
  const bool rms = a.mean == nullptr;
  const float left = rms ? 0.0f : warp_sum(sum);
  const RowStatistics<float> of = row_statistics(about, left, warp_sum(squares), a.width, a.eps, rms);
  if (threadIdx.x % kLanes == 0) {
    if (!rms) a.mean[r] = of.mean();
    a.rstd[r] = of.rstd;
  }
  if (a.y == nullptr) return;
  each_vector<kVectors, kWidth>(a.columns, [&](int i, std::int64_t column) {
    if constexpr (kVectors == 0) {
      row.get(i, column, held[0]);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) held[0][j] -= about;
    }
    write_vector<kWidth>(held[i], of, weights, biases, i, column, a.y + r * a.columns);
  });
}

template <int kWidth, typename In, typename Out, typename Parameter>
__global__ void __launch_bounds__(kThreads) renorm_kernel(Forward<In, Out, Parameter> a) {
  await_the_stream();
  const std::int64_t r = first_row();
  if (r >= a.rows) return;
  const Row<In, 0, kWidth> row(a.x + r * a.columns, a.columns);
  const Row<Parameter, 0, kWidth> weights(a.weight, a.columns, 1.0f), biases(a.bias, a.columns, 0.0f);
  const RowStatistics<float> of{a.mean != nullptr ? a.mean[r] : 0.0f, 0.0f, a.rstd[r]};
  each_vector<0, kWidth>(a.columns, [&](int i, std::int64_t column) {
    float x[kWidth];
    row.get(i, column, x);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) x[j] -= of.first;
    write_vector<kWidth>(x, of, weights, biases, i, column, a.y + r * a.columns);
  });
}

template <int kVectors, int kWidth, typename In, typename Out, typename Parameter>
void launch_forward(const Forward<In, Out, Parameter>& a, const Tensor& beside) {
  launch("norm_forward_kernel", norm_forward_kernel<kVectors, kWidth, In, Out, Parameter>,
         ceil_div(a.rows, kWarps), kThreads, beside, a);
}

// Held where a lane's share leaves registers to work with; else the widest vectors that fit.
template <typename In, typename Out, typename Parameter>
void run_forward(const Forward<In, Out, Parameter>& a, const Tensor& beside) {
  constexpr int kWidth = kFullWidth<In, Out>;
  const auto held = [&](auto vectors) {
    constexpr bool kHolds = vectors() * kWidth * sizeof(In) <= 512;
    if constexpr (kHolds) launch_forward<vectors(), kWidth>(a, beside);
    return kHolds;
  };
  if (a.template fits<kWidth>()) {
    if (with_vectors<kWidth, 160>(a.columns, held)) return;
    return launch_forward<0, kWidth>(a, beside);
  }
  if (a.template fits<2>()) return launch_forward<0, 2>(a, beside);
  launch_forward<0, 1>(a, beside);
}

template <int kWidth, typename In, typename Out, typename Parameter>
void launch_renorm(const Forward<In, Out, Parameter>& a, const Tensor& beside) {
  launch("renorm_kernel", renorm_kernel<kWidth, In, Out, Parameter>, ceil_div(a.rows, kWarps), kThreads, beside,
         a);
}

template <typename In, typename Out, typename Parameter>
void run_renorm(const Forward<In, Out, Parameter>& a, const Tensor& beside) {
  if (a.template fits<kFullWidth<In, Out>>()) return launch_renorm<kFullWidth<In, Out>>(a, beside);
  if (a.template fits<2>()) return launch_renorm<2>(a, beside);
  launch_renorm<1>(a, beside);
}

// Calls use with a Forward of the types at hand, all but its statistics filled in.
template <typename Use>
Tensor forward(const Tensor& x, const Norm& norm, ScalarType dtype, const Use& use) {
  const Tensor y = empty_like_as(x, dtype);
  const OptionalTensor weight = parameter(norm.weight, x.scalar_type());
  const OptionalTensor bias =
      norm.bias && weight ? as_dtype(*norm.bias, weight->scalar_type()) : parameter(norm.bias, x.scalar_type());
  with_types(x.scalar_type(), dtype, [&](auto in, auto out) {
    using In = typename decltype(in)::type;
    using Out = typename decltype(out)::type;
    with_parameter<In>(weight ? weight : bias, [&](auto type) {
      using Parameter = typename decltype(type)::type;
      use(Forward<In, Out, Parameter>{data_of<In>(x), data_of<Parameter>(weight), data_of<Parameter>(bias),
                                      output_of<Out>(y), nullptr, nullptr, x.size(0), x.size(1),
                                      RowWidth<float>(x.size(1)), static_cast<float>(norm.eps)});
    });
  });
  return y;
}

}  // namespace

Normalized norm_rows(const Tensor& x, const Norm& norm, ScalarType dtype) {
  const Tensor mean = empty_beside(x, {norm.rms ? 0 : x.size(0)}, ScalarType::Float);
  const Tensor rstd = empty_beside(x, {x.size(0)}, ScalarType::Float);
  const Tensor y = forward(x, norm, dtype, [&](auto a) {
    a.mean = norm.rms ? nullptr : output_of<float>(mean);
    a.rstd = output_of<float>(rstd);
    run_forward(a, x);
  });
  return {y, mean, rstd};
}

Statistics norm_statistics(const Tensor& x, const Norm& norm) {
  const Tensor mean = empty_beside(x, {norm.rms ? 0 : x.size(0)}, ScalarType::Float);
  const Tensor rstd = empty_beside(x, {x.size(0)}, ScalarType::Float);
  with_type(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    run_forward(Forward<T, T, float>{data_of<T>(x), nullptr, nullptr, nullptr,
                                     norm.rms ? nullptr : output_of<float>(mean), output_of<float>(rstd), x.size(0),
                                     x.size(1), RowWidth<float>(x.size(1)), static_cast<float>(norm.eps)},
                x);
  });
  return {mean, rstd};
}

Tensor renorm_rows(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Norm& norm, ScalarType dtype) {
  return forward(x, norm, dtype, [&](auto a) {
    a.mean = norm.rms ? nullptr : output_of<float>(mean);
    a.rstd = output_of<float>(rstd);
    run_renorm(a, x);
  });
}

}  // namespace fastvit
