// The gradients of LayerNorm and RMSNorm: a warp walks over rows, and keeps its sums for the parameters.
//
// Without a mean (RMSNorm) the mean's pointer is null.
#include "row_kernels.cuh"
#include "row_norm.h"

namespace fastvit {
namespace {

template <typename In, typename Out, typename Parameter>
struct Backward {
  const Out* grad;
  const In* x;
  const float *mean, *rstd;
  const Parameter* weight;
  const In* beside;
  In* dx;
  float *weight_sums, *bias_sums;  // [blocks, columns]
  std::int64_t rows, columns;
  RowWidth<float> width;

  template <int kWidth>
  bool fits() const {
    return vectors_fit<kWidth>(columns, grad, x, weight, beside, dx);
  }
};

// The sums of a block's lanes, warp after warp, so that their order is fixed.
template <int kVectors, int kWidth>
__device__ __forceinline__ void write_sums(const float (&own)[kVectors * kWidth], float* sums,
                                           std::int64_t columns) {
  __shared__ float shared[kVectors * kWidth][kLanes];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  for (int turn = 0; turn < kWarps; ++turn) {
    if (warp == turn) {
#pragma unroll
      for (int k = 0; k < kVectors * kWidth; ++k) {
        shared[k][lane] = turn == 0 ? own[k] : shared[k][lane] + own[k];
      }
    }
    __syncthreads();
  }
  float* mine = sums + blockIdx.x * columns;
  for (int column = threadIdx.x; column < columns; column += kThreads) {
    const int vector = column / kWidth;
    mine[column] = shared[vector / kLanes * kWidth + column % kWidth][vector % kLanes];
  }
  __syncthreads();
}

// So many blocks of a backward pass share a multiprocessor and its registers.
template <int kNumbers>
constexpr int kBackwardBlocks = kNumbers <= 16 ? 4 : (kNumbers <= 24 ? 3 : 2);

// Two sums of float for each number, and both rows where that leaves registers to work with; then what is added to
// the gradient, and last the weight, up to so many bytes.
template <int kNumbers>
constexpr int kBytesHeld = kNumbers <= 16 ? 288 : (kNumbers <= 24 ? 456 : 656);

template <typename In, typename Out, int kNumbers>
constexpr bool kHoldsRows = kNumbers * (2 * sizeof(float) + sizeof(In) + sizeof(Out)) <= 600;

template <typename In, typename Out, int kNumbers>
constexpr bool kHoldsBeside = kHoldsRows<In, Out, kNumbers> &&
                              kNumbers * (2 * sizeof(float) + 2 * sizeof(In) + sizeof(Out)) <= kBytesHeld<kNumbers>;

template <typename In, typename Out, typename Parameter, int kNumbers>
constexpr bool kHoldsWeight =
    kHoldsBeside<In, Out, kNumbers> &&
    kNumbers * (2 * sizeof(float) + 2 * sizeof(In) + sizeof(Out) + sizeof(Parameter)) <= kBytesHeld<kNumbers>;

// With g = weight * grad and h the normalised row: dx = rstd (g - mean(g) - h mean(g h)) + beside. A warp walks
// over rows and keeps its sums of grad * h and grad in registers (for kVectors > 0).
template <int kVectors, int kWidth, typename In, typename Out, typename Parameter>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<kVectors * kWidth>)
    norm_backward_kernel(Backward<In, Out, Parameter> a) {
  await_the_stream();
  constexpr int kSums = kVectors > 0 ? kVectors * kWidth : 1;
  constexpr int kHeld = kHoldsRows<In, Out, kVectors * kWidth> ? kVectors : 0;
  constexpr int kBeside = kHoldsBeside<In, Out, kVectors * kWidth> ? kVectors : 0;
  constexpr int kWeights = kHoldsWeight<In, Out, Parameter, kVectors * kWidth> ? kVectors : 0;
  float weight_sums[kSums] = {}, bias_sums[kSums] = {};
  const Row<Parameter, kWeights, kWidth> weights(a.weight, a.columns, 1.0f);
  for (std::int64_t r = first_row(); r < a.rows; r += static_cast<std::int64_t>(gridDim.x) * kWarps) {
    const float mean = a.mean != nullptr ? a.mean[r] : 0.0f, rstd = a.rstd[r];
    const Row<In, kHeld, kWidth> x_row(a.x + r * a.columns, a.columns);
    const Row<Out, kHeld, kWidth> grad_row(a.grad + r * a.columns, a.columns);
    // With the others, and not after their sums, which would be to wait for memory twice.
    const Row<In, kBeside, kWidth> beside_row(a.beside != nullptr ? a.beside + r * a.columns : nullptr, a.columns);

    float sum = 0.0f, product = 0.0f;
    each_vector<kVectors, kWidth>(a.columns, [&](int i, std::int64_t column) {
      float x[kWidth], grad[kWidth], weight[kWidth];
      x_row.get(i, column, x);
      grad_row.get(i, column, grad);
      weights.get(i, column, weight);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float h = (x[j] - mean) * rstd, g = grad[j] * weight[j];
        sum += g;
        product += g * h;
        if constexpr (kVectors > 0) {
          weight_sums[i * kWidth + j] += grad[j] * h;
          bias_sums[i * kWidth + j] += grad[j];
        }
      }
    });
    if (a.dx == nullptr) continue;
    const float along_mean = a.mean != nullptr ? a.width.mean_of(warp_sum(sum)) : 0.0f;
    const float along_row = a.width.mean_of(warp_sum(product));
    // Of rows that are not held a few vectors at a time: all of them would need more registers than there are.
    each_vector<kHeld, kWidth>(a.columns, [&](int i, std::int64_t column) {
      float x[kWidth], grad[kWidth], weight[kWidth], beside[kWidth];
      x_row.get(i, column, x);
      grad_row.get(i, column, grad);
      weights.get(i, column, weight);
      beside_row.get(i, column, beside);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float h = (x[j] - mean) * rstd, g = grad[j] * weight[j];
        x[j] = rstd * (g - along_mean - h * along_row) + beside[j];
      }
      store_floats<kWidth>(a.dx + r * a.columns + column, x);
    });
  }
  if constexpr (kVectors > 0) {
    if (a.weight_sums != nullptr) write_sums<kVectors, kWidth>(weight_sums, a.weight_sums, a.columns);
    if (a.bias_sums != nullptr) write_sums<kVectors, kWidth>(bias_sums, a.bias_sums, a.columns);
  }
}

// grad * h, for sums over the rows that the kernel above does not keep.
template <typename In, typename Out>
struct WeightTerm {
  const Out* grad;
  const In* x;
  const float *mean, *rstd;
  std::int64_t columns;

  template <int kWidth>
  __device__ __forceinline__ void add(std::int64_t row, std::int64_t column, float (&sums)[kWidth]) const {
    const float mean_of_row = mean != nullptr ? mean[row] : 0.0f, rstd_of_row = rstd[row];
    const Vector<In, kWidth> xs = load<kWidth>(x + row * columns + column);
    const Vector<Out, kWidth> grads = load<kWidth>(grad + row * columns + column);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      sums[j] += to_float(grads.at[j]) * ((to_float(xs.at[j]) - mean_of_row) * rstd_of_row);
    }
  }
};

// The gradients of the parameters from partial sums, one row a block.
template <int kVectors, int kWidth, typename In, typename Out, typename Parameter>
void run_backward(Backward<In, Out, Parameter> a, const Tensor& x, bool needs_weight, bool needs_bias,
                  ScalarType dtype, NormGradients& gradients) {
  const std::int64_t most = kBackwardBlocks<kVectors * kWidth> * multiprocessors(x);
  const std::int64_t blocks = std::min(ceil_div(a.rows, kWarps), most);
  OptionalTensor weight_sums, bias_sums;
  if (needs_weight) weight_sums = empty_beside(x, {blocks, a.columns}, ScalarType::Float);
  if (needs_bias) bias_sums = empty_beside(x, {blocks, a.columns}, ScalarType::Float);
  a.weight_sums = weight_sums ? output_of<float>(*weight_sums) : nullptr;
  a.bias_sums = bias_sums ? output_of<float>(*bias_sums) : nullptr;
  launch("norm_backward_kernel", norm_backward_kernel<kVectors, kWidth, In, Out, Parameter>, blocks, kThreads, x,
         a);
  if (needs_weight) gradients.weight = sum_partials(*weight_sums, dtype);
  if (needs_bias) gradients.bias = sum_partials(*bias_sums, dtype);
}

// The same in a pass for each gradient, for any rows.
template <int kWidth, typename In, typename Out, typename Parameter>
void run_backward_apart(const Backward<In, Out, Parameter>& a, const Tensor& x, bool needs_weight,
                        bool needs_bias, ScalarType dtype, NormGradients& gradients) {
  if (a.dx != nullptr) {
    launch("norm_backward_kernel", norm_backward_kernel<0, kWidth, In, Out, Parameter>, ceil_div(a.rows, kWarps),
           kThreads, x, a);
  }
  if (needs_weight) {
    const WeightTerm<In, Out> term{a.grad, a.x, a.mean, a.rstd, a.columns};
    gradients.weight = sum_columns<kWidth>(term, x, a.rows, a.columns, dtype);
  }
  if (needs_bias) {
    const PlainTerm<Out> term{a.grad, a.columns};
    gradients.bias = sum_columns<kWidth>(term, x, a.rows, a.columns, dtype);
  }
}

}  // namespace

NormGradients norm_rows_backward(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                                 const Norm& norm, const OptionalTensor& beside, bool needs_x,
                                 bool needs_weight, bool needs_bias) {
  NormGradients gradients;
  if (needs_x) gradients.x = empty_like_as(x, x.scalar_type());
  const ScalarType dtype = norm.weight ? norm.weight->scalar_type()
                                       : (norm.bias ? norm.bias->scalar_type() : ScalarType::Float);
  const Tensor rows = packed(grad);
  const OptionalTensor weight = parameter(norm.weight, x.scalar_type());
  const OptionalTensor around = beside ? OptionalTensor(packed(*beside)) : beside;
  with_types(x.scalar_type(), rows.scalar_type(), [&](auto in, auto out) {
    using In = typename decltype(in)::type;
    using Out = typename decltype(out)::type;
    with_parameter<In>(weight, [&](auto type) {
      using Parameter = typename decltype(type)::type;
      constexpr int kWidth = kFullWidth<In, Out>;
      const Backward<In, Out, Parameter> a{
          data_of<Out>(rows), data_of<In>(x), norm.rms ? nullptr : data_of<float>(mean), data_of<float>(rstd),
          data_of<Parameter>(weight), data_of<In>(around), needs_x ? output_of<In>(*gradients.x) : nullptr,
          nullptr, nullptr, x.size(0), x.size(1), RowWidth<float>(x.size(1))};
      const auto together = [&](auto vectors) {
        run_backward<vectors(), kWidth>(a, x, needs_weight, needs_bias, dtype, gradients);
        return true;
      };
      if (a.template fits<kWidth>()) {
        if (a.rows > 0 && with_vectors<kWidth, 64>(a.columns, together)) return;
        return run_backward_apart<kWidth>(a, x, needs_weight, needs_bias, dtype, gradients);
      }
      if (a.template fits<2>()) return run_backward_apart<2>(a, x, needs_weight, needs_bias, dtype, gradients);
      run_backward_apart<1>(a, x, needs_weight, needs_bias, dtype, gradients);
    });
  });
  return gradients;
}

}  // namespace fastvit
