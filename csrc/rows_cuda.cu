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

// Rows times a factor of each, or of each sample_rows rows; float scales of samples, the rows' or float of rows.
template <int kWidth, typename In, typename Out, typename Parameter>
__global__ void __launch_bounds__(kElementThreads)
    scale_kernel(const In* x, const Parameter* scale, Out* out, std::int64_t rows, std::int64_t columns,
                 std::int64_t sample_rows) {
  const std::int64_t index = thread_index(), per_row = columns / kWidth;
  if (index >= rows * per_row) return;
  const std::int64_t row = place_of(index, per_row).row;
  const float factor = to_float(scale[sample_rows > 1 ? place_of(row, sample_rows).row : row]);
  const Vector<In, kWidth> in = load<kWidth>(x + index * kWidth);
  Vector<Out, kWidth> scaled;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) scaled.at[j] = from_float<Out>(factor * to_float(in.at[j]));
  store<kWidth>(out + index * kWidth, scaled);
}

// A warp a row: the sum of a * b, and c * d of that row.
template <int kWidth, typename T, typename Out>
__global__ void __launch_bounds__(kThreads)
    row_products_kernel(const T* a, const T* b, const T* c, const T* d, Out* out, std::int64_t rows,
                        std::int64_t columns) {
  const std::int64_t row = first_row();
  if (row >= rows) return;
  float sum = 0.0f;
  each_vector<0, kWidth>(columns, [&](int, std::int64_t column) {
    const Vector<T, kWidth> left = load<kWidth>(a + row * columns + column);
    const Vector<T, kWidth> right = load<kWidth>(b + row * columns + column);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum += to_float(left.at[j]) * to_float(right.at[j]);
  });
  sum = warp_sum(sum);
  if (threadIdx.x % kLanes != 0) return;
  if (c != nullptr) sum += to_float(c[row]) * to_float(d[row]);
  out[row] = from_float<Out>(sum);
}

template <int kWidth, typename Residual, typename Y, typename Parameter>
void launch_add_scaled(const AddScaled<Residual, Y, Parameter>& a, const Tensor& beside) {
  launch("add_scaled_kernel", add_scaled_kernel<kWidth, Residual, Y, Parameter>,
         element_blocks<kWidth>(a.rows, a.columns), kElementThreads, beside, a);
}

template <typename In, typename Out, typename Parameter>
void scale(const Tensor& x, const Tensor& factors, const Tensor& out, std::int64_t rows, std::int64_t columns,
           std::int64_t sample_rows) {
  constexpr int kWidth = kFullWidth<In, Out>;
  const In* from = data_of<In>(x);
  const Parameter* scales = data_of<Parameter>(factors);
  Out* to = output_of<Out>(out);
  if (vectors_fit<kWidth>(columns, from, to)) {
    launch("scale_kernel", scale_kernel<kWidth, In, Out, Parameter>, element_blocks<kWidth>(rows, columns),
           kElementThreads, x, from, scales, to, rows, columns, sample_rows);
  } else {
    launch("scale_kernel", scale_kernel<1, In, Out, Parameter>, element_blocks<1>(rows, columns),
           kElementThreads, x, from, scales, to, rows, columns, sample_rows);
  }
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

Tensor scale_samples(const Tensor& x, const OptionalTensor& sample_scale, ScalarType dtype) {
  const Tensor rows = as_rows(x);
  if (!sample_scale) return as_dtype(rows, dtype);
  const Tensor in = rows.scalar_type() == ScalarType::Float ? rows : as_dtype(rows, dtype);
  const Tensor out = empty_like_as(in, dtype);
  if (in.size(0) == 0) return out;
  const Tensor factors = *parameter(sample_scale, ScalarType::Float);
  with_types(in.scalar_type(), dtype, [&](auto in_type, auto out_type) {
    scale<typename decltype(in_type)::type, typename decltype(out_type)::type, float>(
        in, factors, out, in.size(0), in.size(1), in.size(0) / factors.size(0));
  });
  return out;
}

Tensor scale_rows(const Tensor& weight, const Tensor& scale_of_rows) {
  const Tensor in = packed(weight);
  const OptionalTensor factors = parameter(OptionalTensor(scale_of_rows), in.scalar_type());
  const Tensor out = empty_like_as(in, in.scalar_type());
  with_type(in.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    with_parameter<T>(factors, [&](auto factor_type) {
      scale<T, T, typename decltype(factor_type)::type>(in, *factors, out, in.size(0),
                                                        in.dim() == 1 ? 1 : in.size(1), 1);
    });
  });
  return out;
}

Tensor row_products(const Tensor& a, const Tensor& b, const OptionalTensor& c, const OptionalTensor& d,
                    ScalarType dtype) {
  const ScalarType common = a.scalar_type();
  const auto alike = [&](const Tensor& x) { return packed(as_dtype(x, common)); };
  const Tensor left = packed(a), right = alike(b);
  const OptionalTensor third = c ? OptionalTensor(alike(*c)) : c, fourth = d ? OptionalTensor(alike(*d)) : d;
  const std::int64_t rows = left.size(0), columns = left.size(1);
  const Tensor out = empty_beside(a, {rows}, dtype == common ? dtype : ScalarType::Float);
  with_type(common, [&](auto type) {
    using T = typename decltype(type)::type;
    with_parameter<T>(OptionalTensor(out), [&](auto out_type) {
      using Out = typename decltype(out_type)::type;
      const T *x = data_of<T>(left), *y = data_of<T>(right);
      const bool full = vectors_fit<kFullWidth<T>>(columns, x, y);
      launch("row_products_kernel",
             full ? row_products_kernel<kFullWidth<T>, T, Out> : row_products_kernel<1, T, Out>,
             ceil_div(rows, kWarps), kThreads, a, x, y, data_of<T>(third), data_of<T>(fourth),
             output_of<Out>(out), rows, columns);
    });
  });
  return as_dtype(out, dtype);
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
