// Sums, scales and residuals of rows. Norms are in norm_cuda.cu, activations in activation_cuda.cu.
#include "row_kernels.cuh"

namespace fastvit {
namespace {

constexpr int kElementThreads = 256;

// A thread a vector, all rows of which are of a multiple of kWidth columns.
template <int kWidth>
std::int64_t element_blocks(std::int64_t rows, std::int64_t columns) {
  return ceil_div(rows * (columns / kWidth), kElementThreads);
}

template <typename Residual, typename Y, typename Parameter>
struct AddScaled {
  const Residual* residual;
  const Y* y;
  const Parameter* layer_scale;
  const float* sample_scale;
  Residual* out;
  std::int64_t rows, columns, sample_rows;
};

template <int kWidth, typename Residual, typename Y, typename Parameter>
__global__ void __launch_bounds__(kElementThreads) add_scaled_kernel(AddScaled<Residual, Y, Parameter> a) {
  await_the_stream();
  const std::int64_t index = thread_index(), per_row = a.columns / kWidth;
  if (index >= a.rows * per_row) return;
  const Place place = place_of(index, per_row);
  const float sample = a.sample_scale != nullptr ? a.sample_scale[place_of(place.row, a.sample_rows).row] : 1.0f;
  float scale[kWidth];
  load_or<kWidth>(a.layer_scale, place.column * kWidth, 1.0f, scale);
  Vector<Residual, kWidth> sum = load<kWidth>(a.residual + index * kWidth);
  const Vector<Y, kWidth> y = load<kWidth>(a.y + index * kWidth);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    sum.at[j] = from_float<Residual>(to_float(sum.at[j]) + sample * (scale[j] * to_float(y.at[j])));
  }
  store<kWidth>(a.out + index * kWidth, sum);
}

// Rows times a factor of each column, and of each sample.
template <int kWidth, typename In, typename Out, typename Parameter>
__global__ void __launch_bounds__(kElementThreads)
    scale_kernel(const In* x, const Parameter* layer_scale, const float* sample_scale, Out* out, std::int64_t rows,
                 std::int64_t columns, std::int64_t sample_rows) {
  await_the_stream();
  const std::int64_t index = thread_index(), per_row = columns / kWidth;
  if (index >= rows * per_row) return;
  const Place place = place_of(index, per_row);
  const float sample = sample_scale != nullptr ? sample_scale[place_of(place.row, sample_rows).row] : 1.0f;
  float scale[kWidth];
  load_or<kWidth>(layer_scale, place.column * kWidth, 1.0f, scale);
  const Vector<In, kWidth> in = load<kWidth>(x + index * kWidth);
  Vector<Out, kWidth> scaled;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) scaled.at[j] = from_float<Out>(scale[j] * to_float(in.at[j]) * sample);
  store<kWidth>(out + index * kWidth, scaled);
}

// a * b, summed over rows.
template <typename T>
struct ProductTerm {
  const T *a, *b;
  std::int64_t columns;

  template <int kWidth>
  __device__ __forceinline__ void add(std::int64_t row, std::int64_t column, float (&sums)[kWidth]) const {
    const Vector<T, kWidth> left = load<kWidth>(a + row * columns + column);
    const Vector<T, kWidth> right = load<kWidth>(b + row * columns + column);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sums[j] += to_float(left.at[j]) * to_float(right.at[j]);
  }
};

template <int kWidth, typename Residual, typename Y, typename Parameter>
void launch_add_scaled(const AddScaled<Residual, Y, Parameter>& a, const Tensor& beside) {
  launch("add_scaled_kernel", add_scaled_kernel<kWidth, Residual, Y, Parameter>,
         element_blocks<kWidth>(a.rows, a.columns), kElementThreads, beside, a);
}

}  // namespace

Tensor add_scaled(const Tensor& residual, const Tensor& y, const OptionalTensor& layer_scale,
                  const OptionalTensor& sample_scale) {
  const Tensor out = empty_like_as(residual, residual.scalar_type());
  const OptionalTensor layer = parameter(layer_scale, y.scalar_type());
  const OptionalTensor sample = parameter(sample_scale, ScalarType::Float);
  const std::int64_t rows = residual.size(0), columns = residual.size(1);
  if (rows == 0) return out;
  const std::int64_t sample_rows = sample ? rows / sample->size(0) : 1;
  with_types(residual.scalar_type(), y.scalar_type(), [&](auto residual_type, auto y_type) {
    using Residual = typename decltype(residual_type)::type;
    using Y = typename decltype(y_type)::type;
    with_parameter<Y>(layer, [&](auto type) {
      using Parameter = typename decltype(type)::type;
      const AddScaled<Residual, Y, Parameter> a{
          data_of<Residual>(residual), data_of<Y>(y), data_of<Parameter>(layer), data_of<float>(sample),
          output_of<Residual>(out),    rows,          columns,                   sample_rows};
      constexpr int kWidth = kFullWidth<Residual, Y>;
      if (vectors_fit<kWidth>(columns, a.residual, a.y, a.layer_scale, a.out)) {
        launch_add_scaled<kWidth>(a, residual);
      } else {
        launch_add_scaled<1>(a, residual);
      }
    });
  });
  return out;
}

Tensor scale(const Tensor& x, const OptionalTensor& layer_scale, const OptionalTensor& sample_scale,
             ScalarType dtype) {
  const Tensor rows = as_rows(x);
  if (!layer_scale && !sample_scale) return as_dtype(rows, dtype);
  const Tensor in = rows.scalar_type() == ScalarType::Float ? rows : as_dtype(rows, dtype);
  const Tensor out = empty_like_as(in, dtype);
  if (in.size(0) == 0) return out;
  const OptionalTensor layer = parameter(layer_scale, in.scalar_type());
  const OptionalTensor sample = parameter(sample_scale, ScalarType::Float);
  const std::int64_t count = in.size(0), columns = in.size(1);
  const std::int64_t sample_rows = sample ? count / sample->size(0) : 1;
  with_types(in.scalar_type(), dtype, [&](auto in_type, auto out_type) {
    using In = typename decltype(in_type)::type;
    using Out = typename decltype(out_type)::type;
    with_parameter<In>(layer, [&](auto type) {
      using Parameter = typename decltype(type)::type;
      constexpr int kWidth = kFullWidth<In, Out>;
      const In* from = data_of<In>(in);
      const Parameter* scales = data_of<Parameter>(layer);
      Out* to = output_of<Out>(out);
      const bool full = vectors_fit<kWidth>(columns, from, scales, to);
      launch("scale_kernel",
             full ? scale_kernel<kWidth, In, Out, Parameter> : scale_kernel<1, In, Out, Parameter>,
             full ? element_blocks<kWidth>(count, columns) : element_blocks<1>(count, columns), kElementThreads, x,
             from, scales, data_of<float>(sample), to, count, columns, sample_rows);
    });
  });
  return out;
}

Tensor sum_products(const Tensor& a, const Tensor& b, ScalarType dtype) {
  const Tensor left = packed(a), right = packed(as_dtype(b, a.scalar_type()));
  const std::int64_t rows = left.size(0), columns = left.size(1);
  Tensor sums;
  with_type(left.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const ProductTerm<T> term{data_of<T>(left), data_of<T>(right), columns};
    if (vectors_fit<kFullWidth<T>>(columns, term.a, term.b)) {
      sums = sum_columns<kFullWidth<T>>(term, left, rows, columns, dtype);
    } else {
      sums = sum_columns<1>(term, left, rows, columns, dtype);
    }
  });
  return sums;
}

Tensor sum_rows(const Tensor& x) {
  Tensor sums;
  with_type(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const PlainTerm<T> term{data_of<T>(x), x.size(1)};
    if (vectors_fit<kFullWidth<T>>(x.size(1), term.x)) {
      sums = sum_columns<kFullWidth<T>>(term, x, x.size(0), x.size(1), x.scalar_type());
    } else {
      sums = sum_columns<1>(term, x, x.size(0), x.size(1), x.scalar_type());
    }
  });
  return sums;
}

}  // namespace fastvit
