// The scalar functions of csrc/ behind plain C names, for test_row_maths.py.
#include <cstdint>

#include "activations.h"
#include "brain_float.h"
#include "row_norm.h"

using namespace fastvit;

namespace {

// A GPU's functions at their worst, as PTX documents them: ex2.approx.ftz is within 2^-22 of its result and
// rcp.approx.ftz within 2^-23, and what is below the normal numbers is zero, of arguments too. kSign says on which
// side both are; of opposite sides the errors would cancel in part. The reciprocal of one is taken to be one.
template <int kSign>
struct WorstFunctions {
  static float flushed(double x) { return std::fabs(x) < 0x1p-126 ? 0.0f : float(x); }
  static float power_of_two(float x) { return flushed(std::exp2(double(flushed(x))) * (1 + kSign * 0x1p-22)); }
  static float reciprocal(float x) { return x == 1 ? 1 : flushed(1 / double(flushed(x)) * (1 - kSign * 0x1p-23)); }
};

template <typename Function, typename T>
void each(const T* x, T* value, T* both, T* slope, std::int64_t count) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) {
    T own;
    value[i] = Function::value(x[i]);
    both[i] = Function::both(x[i], own);
    slope[i] = own;
  }
}

// One pass for the mean (or `guess` in its place), one for what is left of it, as the loops over rows do.
template <typename T>
void statistics(const T* x, const T* guess, T eps, int rms, std::int64_t cols, T* mean, T* rstd, T* normalized) {
  T sum = 0, off = 0, squares = 0;
  for (std::int64_t i = 0; i < cols; ++i) sum += x[i];
  const T first = rms ? T(0) : (guess ? *guess : sum / cols);
  for (std::int64_t i = 0; i < cols; ++i) {
    const T d = x[i] - first;
    off += d;
    squares += d * d;
  }
  const RowStatistics<T> row = row_statistics(first, off, squares, RowWidth<T>(cols), eps, rms != 0);
  *mean = row.mean();
  *rstd = row.rstd;
  for (std::int64_t i = 0; i < cols; ++i) normalized[i] = row.apply(x[i]);
}

template <typename T>
void slope(const T* grad, const T* normalized, T rstd, int rms, std::int64_t cols, T* dx) {
  T sum = 0, product = 0;
  for (std::int64_t i = 0; i < cols; ++i) {
    sum += grad[i];
    product += grad[i] * normalized[i];
  }
  const RowSlope<T> row = row_slope(sum, product, RowWidth<T>(cols), rstd, rms != 0);
  for (std::int64_t i = 0; i < cols; ++i) dx[i] = row.apply(grad[i], normalized[i]);
}

}  // namespace

#define FASTVIT_NAMES(T)                                                                                     \
  void gelu_##T(const T* x, T* v, T* b, T* s, std::int64_t n) { each<Gelu>(x, v, b, s, n); }                 \
  void gelu_tanh_##T(const T* x, T* v, T* b, T* s, std::int64_t n) { each<GeluTanh>(x, v, b, s, n); }        \
  void quick_gelu_##T(const T* x, T* v, T* b, T* s, std::int64_t n) { each<QuickGelu>(x, v, b, s, n); }      \
  void silu_##T(const T* x, T* v, T* b, T* s, std::int64_t n) { each<Silu>(x, v, b, s, n); }                 \
  void relu_##T(const T* x, T* v, T* b, T* s, std::int64_t n) { each<Relu>(x, v, b, s, n); }                 \
  void statistics_##T(const T* x, const T* guess, T eps, int rms, std::int64_t cols, T* mean, T* rstd,       \
                      T* normalized) {                                                                       \
    statistics(x, guess, eps, rms, cols, mean, rstd, normalized);                                            \
  }                                                                                                          \
  void slope_##T(const T* grad, const T* normalized, T rstd, int rms, std::int64_t cols, T* dx) {            \
    slope(grad, normalized, rstd, rms, cols, dx);                                                            \
  }

extern "C" {
FASTVIT_NAMES(float)
FASTVIT_NAMES(double)
void gelu_half_float(const float* x, float* v, float* b, float* s, std::int64_t n) {
  each<GeluHalf>(x, v, b, s, n);
}
void gelu_half_above_float(const float* x, float* v, float* b, float* s, std::int64_t n) {
  each<GeluHalfOf<WorstFunctions<1>>>(x, v, b, s, n);
}
void gelu_half_below_float(const float* x, float* v, float* b, float* s, std::int64_t n) {
  each<GeluHalfOf<WorstFunctions<-1>>>(x, v, b, s, n);
}
void quotient_float(const float* sum, const float* width, float* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = quotient(sum[i], width[i], 1.0f / width[i]);
}
void power_of_two_float(const float* x, float* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = power_of_two(x[i]);
}
void exponential_float(const float* x, float* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = exponential(x[i]);
}
void rounded(const float* x, std::uint16_t* bits, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    BrainFloat to;
    store(to, x[i]);
    bits[i] = to.bits;
  }
}
void widened(const std::uint16_t* bits, float* x, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) x[i] = widen(BrainFloat{bits[i]});
}
}
