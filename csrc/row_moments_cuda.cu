// The moments of rows, and what a norm takes from them. On Hopper a product leaves them; where none does, a warp takes
// them from a row.
#include "row_kernels.cuh"
#include "row_moments.h"

namespace fastvit {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    row_moments_kernel(const T* x, float2* moments, std::int64_t rows, std::int64_t columns) {
  await_the_stream();
  const std::int64_t r = first_row();
  if (r >= rows) return;
  constexpr int kOfALane = kMomentColumns / kLanes;
  const int lane = threadIdx.x % kLanes;
  for (std::int64_t first = 0; first < columns; first += kMomentColumns) {
    const std::int64_t left = columns - first;
    const float count = static_cast<float>(left < kMomentColumns ? left : kMomentColumns);
    float numbers[kOfALane], sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kOfALane; ++i) {
      const int column = i * kLanes + lane;
      numbers[i] = column < left ? to_float(x[r * columns + first + column]) : 0.0f;
      sum += numbers[i];
    }
    const float mean = quotient(warp_sum(sum), count);
#pragma unroll
    for (int i = 0; i < kOfALane; ++i) {
      if (i * kLanes + lane < left) squares += (numbers[i] - mean) * (numbers[i] - mean);
    }
    squares = warp_sum(squares);
    if (lane == 0) moments[first / kMomentColumns * rows + r] = {mean, squares};
  }
}

constexpr int kRowThreads = 128;

// A thread a row.
__global__ void __launch_bounds__(kRowThreads)
    statistics_kernel(const float2* moments, float* mean, float* rstd, std::int64_t rows, std::int64_t columns,
                      float eps) {
  await_the_stream();
  const std::int64_t row = thread_index();
  if (row >= rows) return;
  const Moments<float> of = joined_moments<float>(columns, [&](std::int64_t part, float& part_mean, float& squares) {
    const float2 pair = moments[part * rows + row];
    part_mean = pair.x;
    squares = pair.y;
  });
  const RowStatistics<float> statistics = statistics_from(of, eps, mean == nullptr);
  if (mean != nullptr) mean[row] = statistics.mean();
  rstd[row] = statistics.rstd;
}

}  // namespace

Tensor row_moments(const Tensor& x) {
  const Tensor moments = empty_beside(x, {moment_parts(x.size(1)), x.size(0), 2}, ScalarType::Float);
  with_type(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    launch("row_moments_kernel", row_moments_kernel<T>, ceil_div(x.size(0), kWarps), kThreads, x, data_of<T>(x),
           output_of<float2>(moments), x.size(0), x.size(1));
  });
  return moments;
}

Statistics statistics_of_moments(const Tensor& moments_, const Tensor& x, const Norm& norm) {
  const std::int64_t rows = x.size(0), columns = x.size(1);
  const Tensor moments = checked_moments(moments_, x, moment_parts(columns));
  const Tensor mean = empty_beside(x, {norm.rms ? 0 : rows}, ScalarType::Float);
  const Tensor rstd = empty_beside(x, {rows}, ScalarType::Float);
  launch("statistics_kernel", statistics_kernel, ceil_div(rows, kRowThreads), kRowThreads, x,
         data_of<float2>(moments), norm.rms ? nullptr : output_of<float>(mean), output_of<float>(rstd), rows, columns,
         static_cast<float>(norm.eps));
  return {mean, rstd};
}

}  // namespace fastvit
