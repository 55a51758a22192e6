// The activations of vision transformers, value and slope, without a branch: a compiler makes vectors of them.
//
// Each is a struct with `value(x)` and `both(x, slope)`, for float and double. GeluHalf is for outputs that
// are rounded to half precision; every other is as exact as its type.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "activation_names.h"
#include "host_device.h"

namespace fastvit {

// Beside 1.5 * 2^23 a float's last bit is one: a sum with it is rounded, and ends in the whole number's bits.
constexpr float kWholeNumbers = 12582912.0f;

// e^r 2^n for r within ln 2 / 2 of zero, where `sum` is kWholeNumbers + n.
FASTVIT_HOST_DEVICE float exponential_times_power(float r, float sum) {
  float p = 1.9875691e-4f;
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665795e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  std::uint32_t bits;
  std::memcpy(&bits, &sum, sizeof bits);
  bits = (bits + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// e^x for x from -87 to 88, or nan. On a CPU by hand, within 2 ulp: a call to expf would stop a loop from
// becoming vectors.
FASTVIT_HOST_DEVICE float exponential_within(float x) {
#if defined(__CUDA_ARCH__)
  return __expf(x);
#else
  const float sum = x * 1.44269504f + kWholeNumbers, n = sum - kWholeNumbers;
  // ln 2 in two parts, so that n ln 2 is exact to more than a float holds.
  return exponential_times_power((x - n * 0.693359375f) + n * 2.12194440e-4f, sum);
#endif
}

// 2^x for every x, within 2 ulp: on a GPU a single instruction. Below -126 it is zero or as little as 2^-126, and
// infinite from 128 on (on a CPU from 127.5 on).
FASTVIT_HOST_DEVICE float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float cut = x < -126.0f ? -126.0f : (x > 128.0f ? 128.0f : x);
  const float sum = cut + kWholeNumbers, n = sum - kWholeNumbers;
  return exponential_times_power((cut - n) * 0.693147181f, sum);
#endif
}

// e^x for every x; zero below -87 and infinite above 88.
FASTVIT_HOST_DEVICE float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  const float y = exponential_within(x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x));
  const float low = x < -87.0f ? 0.0f : y;
  return x > 88.0f ? INFINITY : low;
#endif
}

FASTVIT_HOST_DEVICE double exponential(double x) { return exp(x); }

// 1 / x for x of at least one; on a GPU a single instruction, within one ulp and zero from 2^126 on. Exact division
// is nine, and a call for rare operands.
FASTVIT_HOST_DEVICE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

FASTVIT_HOST_DEVICE double reciprocal(double x) { return 1.0 / x; }

template <typename T>
FASTVIT_HOST_DEVICE T sigmoid(T x) {
  return reciprocal(T(1) + exponential(-x));
}

// x Phi(x), with the distribution's tail from erfc(z) = e^(-z^2) t P(t), t = 1 / (1 + 0.35 z): nothing
// cancels where x is negative. P is a minimax fit for z up to 10 of relative error 7e-9.
struct Gelu {
  FASTVIT_HOST_DEVICE static float distribution(float x, float& density) {
    const float z = fabsf(x) * 0.707106781f;
    const float t = 1.0f / (1.0f + 0.35f * z);
    float p = 0.03840105604972333f;
    p = p * t - 0.15892829120209054f;
    p = p * t + 0.18146121041311478f;
    p = p * t - 0.027705589105760337f;
    p = p * t + 0.0870186677747861f;
    p = p * t + 0.1460422567706943f;
    p = p * t + 0.1511861537669374f;
    p = p * t + 0.18790241114741102f;
    p = p * t + 0.19713835299897048f;
    p = p * t + 0.19748377850979876f;
    const float bell = exponential(-0.5f * x * x);
    const float tail = 0.5f * bell * (p * t);
    density = 0.398942280f * bell;
    return x < 0.0f ? tail : 1.0f - tail;
  }

  FASTVIT_HOST_DEVICE static double distribution(double x, double& density) {
    density = 0.39894228040143267794 * exp(-0.5 * x * x);
    return 0.5 * erfc(-x * 0.70710678118654752440);
  }

  template <typename T>
  FASTVIT_HOST_DEVICE static T value(T x) {
    T density;
    return x * distribution(x, density);
  }

  template <typename T>
  FASTVIT_HOST_DEVICE static T both(T x, T& slope) {
    T density;
    const T phi = distribution(x, density);
    slope = phi + x * density;
    return x * phi;
  }
};

struct FastFunctions {
  FASTVIT_HOST_DEVICE static float power_of_two(float x) { return fastvit::power_of_two(x); }
  FASTVIT_HOST_DEVICE static float reciprocal(float x) { return fastvit::reciprocal(x); }
};

// The same within 3.6e-6 (4e-6 with a GPU's functions), which half precision does not see: x sigmoid(u), u = x Q(x^2),
// with Q kept as it is at |x| = 6 beyond. There is no other cut: where x is large, 2^(-u log2 e) is zero or infinite,
// and the result is x or zero. A nan comes through x. Of a GPU's instructions it takes eleven, and its slope six more.
// Its slope is its own, sigmoid(u) + x sigmoid(u) (1 - sigmoid(u)) u', so that one exponential does.
template <typename Functions>
struct GeluHalfOf {
  FASTVIT_HOST_DEVICE static float distribution(float x, float& u_slope) {
    constexpr double kFold = -1.44269504088896341;  // -log2 e
    const float square = x * x, s = square < 36.0f ? square : 36.0f;
    const float q = float(kFold * 1.59565515) + s * (float(kFold * 0.0729398617) +
                    s * (float(kFold * -2.50952452e-4) + s * (float(kFold * -6.09343903e-5) +
                    s * float(kFold * 2.22526314e-6))));
    u_slope = 1.59565515f + s * (3.0f * 0.0729398617f +
              s * (5.0f * -2.50952452e-4f + s * (7.0f * -6.09343903e-5f + s * (9.0f * 2.22526314e-6f))));
    return Functions::reciprocal(1.0f + Functions::power_of_two(x * q));
  }

  FASTVIT_HOST_DEVICE static float value(float x) {
    float u_slope;
    return x * distribution(x, u_slope);
  }

  FASTVIT_HOST_DEVICE static float both(float x, float& slope) {
    float u_slope;
    const float phi = distribution(x, u_slope), y = x * phi;
    slope = phi + (y - y * phi) * u_slope;
    return y;
  }
};

using GeluHalf = GeluHalfOf<FastFunctions>;

// x sigmoid(k x), of which the three below are made.
template <typename T>
FASTVIT_HOST_DEVICE T scaled_silu(T x, T k, T& slope) {
  const T s = sigmoid(k * x), y = x * s;
  slope = s + y * (T(1) - s) * k;
  return y;
}

struct Silu {
  template <typename T>
  FASTVIT_HOST_DEVICE static T both(T x, T& slope) {
    return scaled_silu(x, T(1), slope);
  }
  template <typename T>
  FASTVIT_HOST_DEVICE static T value(T x) {
    T slope;
    return both(x, slope);
  }
};

struct QuickGelu {
  template <typename T>
  FASTVIT_HOST_DEVICE static T both(T x, T& slope) {
    return scaled_silu(x, T(1.702), slope);
  }
  template <typename T>
  FASTVIT_HOST_DEVICE static T value(T x) {
    T slope;
    return both(x, slope);
  }
};

// 0.5 x (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3), which is x sigmoid(2u).
struct GeluTanh {
  template <typename T>
  FASTVIT_HOST_DEVICE static T both(T x, T& slope) {
    const T k = T(1.59576912160573071176), c = T(0.044715);
    const T s = sigmoid(k * (x + c * x * x * x)), y = x * s;
    const T rest = y * (T(1) - s);  // where it is zero, x * x may be infinite
    slope = rest == T(0) ? s : s + rest * k * (T(1) + T(3) * c * x * x);
    return y;
  }
  template <typename T>
  FASTVIT_HOST_DEVICE static T value(T x) {
    T slope;
    return both(x, slope);
  }
};

struct Relu {
  template <typename T>
  FASTVIT_HOST_DEVICE static T both(T x, T& slope) {
    slope = x > T(0) ? T(1) : T(0);
    return x > T(0) ? x : (x != x ? x : T(0));
  }
  template <typename T>
  FASTVIT_HOST_DEVICE static T value(T x) {
    return x > T(0) ? x : (x != x ? x : T(0));
  }
};

// Calls use(function) with the activation's struct; of exact GELU's two, the one that is given.
template <typename OneGelu, typename Use>
FASTVIT_HOST_DEVICE void choose_activation(Activation activation, const Use& use) {
  switch (activation) {
    case Activation::kGelu:
      return use(OneGelu());
    case Activation::kGeluTanh:
      return use(GeluTanh());
    case Activation::kQuickGelu:
      return use(QuickGelu());
    case Activation::kSilu:
      return use(Silu());
    case Activation::kRelu:
      return use(Relu());
  }
}

}  // namespace fastvit
