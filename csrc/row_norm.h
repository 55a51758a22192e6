// LayerNorm and RMSNorm of one row, as far as it is the same on a CPU and on a GPU: what becomes of its sums.
#pragma once

#include <cmath>

#include "host_device.h"

namespace fastvit {

// The row's mean in two parts, because their sum may not hold in a float what is left of (x - mean).
template <typename T>
struct RowStatistics {
  T first, rest, rstd;

  FASTVIT_HOST_DEVICE T mean() const { return first + rest; }
  FASTVIT_HOST_DEVICE T apply(T x) const { return apply_centred(x - first); }
  FASTVIT_HOST_DEVICE T apply_centred(T x) const { return (x - rest) * rstd; }
};

FASTVIT_HOST_DEVICE float inverse_root(float x) {
#if defined(__CUDA_ARCH__)
  return rsqrtf(x);
#else
  return 1.0f / sqrtf(x);
#endif
}
FASTVIT_HOST_DEVICE double inverse_root(double x) { return 1.0 / sqrt(x); }

// sum / width by a product with share = 1 / width and what that leaves over: rounded as a division is, without the
// call for rare operands in which a GPU's divisions end. An infinite sum leaves no number over.
FASTVIT_HOST_DEVICE float quotient(float sum, float width, float share) {
  const float near = sum * share, left = fmaf(-near, width, sum);
  return left == left ? fmaf(left, share, near) : near;
}

// How many numbers a row has, by which its sums are divided.
template <typename T>
struct RowWidth {
  T width, share;

  explicit RowWidth(T width) : width(width), share(T(1) / width) {}

  FASTVIT_HOST_DEVICE T mean_of(T sum) const {
#if defined(__CUDA_ARCH__)
    return quotient(sum, width, share);
#else
    return sum / width;
#endif
  }
};

// From sums over a row of (x - first) and of its square; for RMSNorm first is 0 and stays the mean.
template <typename T>
FASTVIT_HOST_DEVICE RowStatistics<T> row_statistics(T first, T sum, T squares, const RowWidth<T>& row, T eps,
                                                    bool rms) {
  const T rest = rms ? T(0) : row.mean_of(sum);
  const T variance = row.mean_of(squares) - rest * rest;
  return {first, rest, inverse_root((variance < T(0) ? T(0) : variance) + eps)};
}

// The gradient of one row: rstd (g - mean(g) - xhat mean(g xhat)), and for RMSNorm without the second term.
template <typename T>
struct RowSlope {
  T mean, product, rstd;

  FASTVIT_HOST_DEVICE T apply(T grad, T normalized) const {
    return rstd * ((grad - mean) - normalized * product);
  }
};

// From sums over a row of g and of g xhat, g being the gradient times the norm's weight.
template <typename T>
FASTVIT_HOST_DEVICE RowSlope<T> row_slope(T sum, T product, const RowWidth<T>& row, T rstd, bool rms) {
  return {rms ? T(0) : row.mean_of(sum), row.mean_of(product), rstd};
}

}  // namespace fastvit
