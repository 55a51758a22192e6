// Activations of rows, with a gate or without, forward and backward.
#include "activations.h"
#include "row_kernels.cuh"

namespace fastvit {
namespace {

constexpr int kActivationThreads = 256;

// Rows apart by a stride: halves of a wider tensor.
template <typename T>
struct Strided {
  T* start;
  std::int64_t stride;

  __device__ __forceinline__ T* at(const Place& place) const {
    return start + place.row * stride + place.column;
  }
};

template <typename T>
Strided<const T> strided(const OptionalTensor& x) {
  return x ? Strided<const T>{data_of<T>(*x), x->stride(0)} : Strided<const T>{nullptr, 0};
}

template <int kWidth, typename T>
__device__ __forceinline__ void load_floats(const T* from, float (&values)[kWidth]) {
  const Vector<T, kWidth> vector = load<kWidth>(from);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) values[j] = to_float(vector.at[j]);
}

// value and out may be one tensor.
template <typename T>
struct Forward {
  Strided<const T> value, gate;
  T* out;
  std::int64_t rows, columns;

  template <int kWidth>
  bool fits() const {
    return (value.stride | gate.stride) % kWidth == 0 &&
           vectors_fit<kWidth>(columns, value.start, gate.start, out);
  }
};

template <int kWidth, typename Function, typename T>
__global__ void __launch_bounds__(kActivationThreads) activate_kernel(Forward<T> a) {
  await_the_stream();
  const std::int64_t index = thread_index(), per_row = a.columns / kWidth;
  if (index >= a.rows * per_row) return;
  Place place = place_of(index, per_row);
  place.column *= kWidth;
  float value[kWidth];
  load_floats<kWidth>(a.value.at(place), value);
  if (a.gate.start != nullptr) {
    float gate[kWidth];
    load_floats<kWidth>(a.gate.at(place), gate);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) value[j] *= Function::value(gate[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) value[j] = Function::value(value[j]);
  }
  store_floats<kWidth>(a.out + index * kWidth, value);
}

// grad and value_gradient may be one tensor.
template <typename T>
struct Backward {
  const T* grad;
  Strided<const T> value, gate;
  Strided<T> value_gradient, gate_gradient;
  T* activated;
  std::int64_t rows, columns;

  template <int kWidth>
  bool fits() const {
    const std::int64_t strides = value.stride | gate.stride | value_gradient.stride | gate_gradient.stride;
    return strides % kWidth == 0 && vectors_fit<kWidth>(columns, grad, value.start, gate.start, activated,
                                                        value_gradient.start, gate_gradient.start);
  }
};

template <int kWidth, typename Function, typename T>
__global__ void __launch_bounds__(kActivationThreads) activate_backward_kernel(Backward<T> a) {
  await_the_stream();
  const std::int64_t index = thread_index(), per_row = a.columns / kWidth;
  if (index >= a.rows * per_row) return;
  Place place = place_of(index, per_row);
  place.column *= kWidth;
  float grad[kWidth], value[kWidth], activated[kWidth];
  load_floats<kWidth>(a.grad + index * kWidth, grad);
  load_floats<kWidth>(a.value.at(place), value);
  if (a.gate.start != nullptr) {
    float gate[kWidth];
    load_floats<kWidth>(a.gate.at(place), gate);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      float slope;
      const float factor = Function::both(gate[j], slope);
      gate[j] = grad[j] * value[j] * slope;
      activated[j] = factor * value[j];
      value[j] = grad[j] * factor;
    }
    store_floats<kWidth>(a.gate_gradient.at(place), gate);
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      float slope;
      activated[j] = Function::both(value[j], slope);
      value[j] = grad[j] * slope;
    }
  }
  store_floats<kWidth>(a.value_gradient.at(place), value);
  store_floats<kWidth>(a.activated + index * kWidth, activated);
}

// Calls use(Type<Function>) with the activation for rows of T: GeluHalf is as exact as half precision shows.
template <typename T, typename Use>
void with_activation(Activation activation, const Use& use) {
  switch (activation) {
    case Activation::kGelu:
      return use(Type<std::conditional_t<std::is_same_v<T, float>, Gelu, GeluHalf>>{});
    case Activation::kGeluTanh:
      return use(Type<GeluTanh>{});
    case Activation::kQuickGelu:
      return use(Type<QuickGelu>{});
    case Activation::kSilu:
      return use(Type<Silu>{});
    case Activation::kRelu:
      return use(Type<Relu>{});
  }
}

template <int kWidth>
std::int64_t blocks_of(std::int64_t rows, std::int64_t columns) {
  return ceil_div(rows * (columns / kWidth), kActivationThreads);
}

template <int kWidth, typename Function, typename T>
void launch_forward(const Forward<T>& a, const Tensor& beside) {
  launch("activate_kernel", activate_kernel<kWidth, Function, T>, blocks_of<kWidth>(a.rows, a.columns),
         kActivationThreads, beside, a);
}

template <int kWidth, typename Function, typename T>
void launch_backward(const Backward<T>& a, const Tensor& beside) {
  launch("activate_backward_kernel", activate_backward_kernel<kWidth, Function, T>,
         blocks_of<kWidth>(a.rows, a.columns), kActivationThreads, beside, a);
}

void activate_into(const Tensor& out, const Tensor& value, const OptionalTensor& gate, Activation activation) {
  with_type(value.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    Forward<T> a{strided<T>(value), strided<T>(gate), output_of<T>(out), value.size(0), value.size(1)};
    // Rows that follow each other are one, of which more vectors fit and whose places need no division.
    if (value.is_contiguous() && (!gate || gate->is_contiguous())) {
      a.columns *= a.rows;
      a.rows = 1;
      a.value.stride = a.gate.stride = 0;
    }
    with_activation<T>(activation, [&](auto function) {
      using Function = typename decltype(function)::type;
      if (a.template fits<kFullWidth<T>>()) return launch_forward<kFullWidth<T>, Function>(a, value);
      launch_forward<1, Function>(a, value);
    });
  });
}

}  // namespace

Tensor activate(const Tensor& value, const OptionalTensor& gate, Activation activation) {
  const Tensor out = empty_like_as(value, value.scalar_type());
  activate_into(out, value, gate, activation);
  return out;
}

void activate_in_place(const Tensor& rows, Activation activation) {
  activate_into(rows, rows, std::nullopt, activation);
}

ActivationGradients activate_backward(const Tensor& grad, const Tensor& value, const OptionalTensor& gate,
                                      Activation activation, bool packed_halves) {
  const std::int64_t rows = value.size(0), columns = value.size(1);
  const ScalarType dtype = value.scalar_type();
  const Tensor incoming = packed(grad), activated = empty_beside(value, {rows, columns}, dtype);
  const std::int64_t width = packed_halves ? 2 * columns : columns;
  const Tensor value_gradient = packed_halves ? empty_beside(value, {rows, width}, dtype) : incoming;
  OptionalTensor gate_gradient;
  if (gate && !packed_halves) gate_gradient = empty_beside(value, {rows, columns}, dtype);
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    Backward<T> a{data_of<T>(incoming),    strided<T>(value), strided<T>(gate), {}, {},
                  output_of<T>(activated), rows,              columns};
    T* start = output_of<T>(value_gradient);
    a.value_gradient = {packed_halves ? start + columns : start, width};
    a.gate_gradient = {packed_halves ? start : (gate_gradient ? output_of<T>(*gate_gradient) : nullptr), width};
    with_activation<T>(activation, [&](auto function) {
      using Function = typename decltype(function)::type;
      if (a.template fits<kFullWidth<T>>()) return launch_backward<kFullWidth<T>, Function>(a, value);
      launch_backward<1, Function>(a, value);
    });
  });
  return {value_gradient, gate_gradient, activated};
}

}  // namespace fastvit
