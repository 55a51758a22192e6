// rows.h on a CPU: memory, threads, and which loops. Sums over rows go by chunks of a fixed size that are added
// in order, so that they do not depend on the number of threads.
#include <algorithm>

#include "row_loops.h"
#include "scope.h"

namespace fastvit {

// One namespace for each level that row_loops.cpp was compiled for.
namespace base {
const RowLoops* row_loops(ScalarType input, ScalarType output);
}
#if defined(FASTVIT_LEVELS)
namespace v3 {
const RowLoops* row_loops(ScalarType input, ScalarType output);
}
namespace v4 {
const RowLoops* row_loops(ScalarType input, ScalarType output);
}
#endif

const RowLoops& row_loops(ScalarType input, ScalarType output) {
  const bool known = (output == ScalarType::Float || output == ScalarType::Double ||
                      output == ScalarType::BFloat16) &&
                     (input == output || input == ScalarType::Float) &&
                     !(input == ScalarType::Float && output == ScalarType::Double);
  STD_TORCH_CHECK(known, current_op, ": the CPU library has no rows of ", name_of(input), " beside ",
                  name_of(output));
#if defined(FASTVIT_LEVELS)
  static const auto best = __builtin_cpu_supports("x86-64-v4")   ? v4::row_loops
                           : __builtin_cpu_supports("x86-64-v3") ? v3::row_loops
                                                                 : base::row_loops;
  return *best(input, output);
#else
  return *base::row_loops(input, output);
#endif
}

namespace {

constexpr Size kChunk = 32;                // rows that are summed before they join the rest
constexpr Size kElementsAThread = 1 << 14;  // fewer are not worth waking another thread

Size rows_of(const Tensor& x) { return x.size(0); }
Size cols_of(const Tensor& x) { return x.size(1); }

const char* at(const Tensor& x, Size row, Size stride) {
  return static_cast<const char*>(x.const_data_ptr()) + row * stride * Size(x.element_size());
}
char* at(Tensor& x, Size row, Size stride) {
  return static_cast<char*>(x.mutable_data_ptr()) + row * stride * Size(x.element_size());
}
const char* at(const OptionalTensor& x, Size row, Size stride) { return x ? at(*x, row, stride) : nullptr; }
char* at(OptionalTensor& x, Size row, Size stride) { return x ? at(*x, row, stride) : nullptr; }

template <typename Function>
void for_rows(Size rows, Size cols, Function function) {
  const Size grain = std::max<Size>(1, kElementsAThread / std::max<Size>(cols, 1));
  torch::stable::parallel_for(0, rows, grain, [&](Size begin, Size end) {
    if (begin < end) function(begin, end - begin);
  });
}

OptionalTensor wide(const OptionalTensor& x, ScalarType dtype) {
  if (!x) return x;
  return torch::stable::contiguous(as_dtype(*x, dtype));
}

// A norm's vectors as the loops read them, kept alive here.
struct WideNorm {
  OptionalTensor weight, bias;
  NormArrays arrays;

  WideNorm(const Norm& norm, ScalarType dtype)
      : weight(wide(norm.weight, dtype)), bias(wide(norm.bias, dtype)) {
    // The loops have no bias without a weight.
    if (bias && !weight) weight = torch::stable::full({bias->size(0)}, 1.0, dtype);
    arrays = {at(weight, 0, 0), at(bias, 0, 0), norm.eps, norm.rms};
  }
};

// The sums of chunks [C, D], in order, as [D] in dtype.
Tensor add_chunks(Tensor& chunks, const RowLoops& loops, ScalarType dtype) {
  const Size cols = cols_of(chunks);
  Tensor sum = torch::stable::new_zeros(chunks, {cols}, chunks.scalar_type());
  loops.sum_rows(at(chunks, 0, 0), at(sum, 0, 0), rows_of(chunks), cols);
  return as_dtype(sum, dtype);
}

}  // namespace

Normalized norm_rows(const Tensor& x, const Norm& norm, ScalarType dtype) {
  const RowLoops& loops = row_loops(x.scalar_type(), dtype);
  const ScalarType of_statistics = statistics_dtype(dtype);
  const WideNorm how(norm, of_statistics);
  const Size rows = rows_of(x), cols = cols_of(x);
  Normalized to{empty_beside(x, {rows, cols}, dtype), empty_beside(x, {norm.rms ? 0 : rows}, of_statistics),
                empty_beside(x, {rows}, of_statistics)};
  for_rows(rows, cols, [&](Size row, Size count) {
    loops.norm(at(x, row, cols), at(to.rows, row, cols), norm.rms ? nullptr : at(to.mean, row, 1),
               at(to.rstd, row, 1), how.arrays, count, cols);
  });
  return to;
}

Tensor renorm_rows(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Norm& norm,
                   ScalarType dtype) {
  const RowLoops& loops = row_loops(x.scalar_type(), dtype);
  const WideNorm how(norm, statistics_dtype(dtype));
  const Size cols = cols_of(x);
  Tensor out = empty_beside(x, {rows_of(x), cols}, dtype);
  for_rows(rows_of(x), cols, [&](Size row, Size count) {
    loops.renorm(at(x, row, cols), at(out, row, cols), norm.rms ? nullptr : at(mean, row, 1),
                 at(rstd, row, 1), how.arrays, count, cols);
  });
  return out;
}

NormGradients norm_rows_backward(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                                 const Norm& norm, const OptionalTensor& beside_, bool needs_x,
                                 bool needs_weight, bool needs_bias) {
  const ScalarType dtype = grad.scalar_type(), of_sums = statistics_dtype(dtype);
  const RowLoops& loops = row_loops(x.scalar_type(), dtype);
  const WideNorm how(norm, of_sums);
  const OptionalTensor beside = wide(beside_, x.scalar_type());
  const Size rows = rows_of(x), cols = cols_of(x), chunks = (rows + kChunk - 1) / kChunk;
  OptionalTensor dx, weight_sums, bias_sums;
  if (needs_x) dx = empty_beside(x, {rows, cols}, x.scalar_type());
  if (needs_weight) weight_sums = torch::stable::new_zeros(x, {chunks, cols}, of_sums);
  if (needs_bias) bias_sums = torch::stable::new_zeros(x, {chunks, cols}, of_sums);
  for_rows(chunks, kChunk * cols, [&](Size first, Size count) {
    for (Size chunk = first; chunk < first + count; ++chunk) {
      const Size row = chunk * kChunk;
      loops.norm_backward(at(grad, row, cols), at(x, row, cols), norm.rms ? nullptr : at(mean, row, 1),
                          at(rstd, row, 1), how.arrays, at(beside, row, cols), at(dx, row, cols),
                          at(weight_sums, chunk, cols), at(bias_sums, chunk, cols),
                          std::min(kChunk, rows - row), cols);
    }
  });
  NormGradients gradients{dx, {}, {}};
  const RowLoops& adding = row_loops(of_sums, of_sums);
  if (needs_weight) gradients.weight = add_chunks(*weight_sums, adding, norm.weight->scalar_type());
  if (needs_bias) gradients.bias = add_chunks(*bias_sums, adding, norm.bias->scalar_type());
  return gradients;
}

Tensor activate(const Tensor& value, const OptionalTensor& gate, Activation activation) {
  const RowLoops& loops = row_loops(value.scalar_type(), value.scalar_type());
  const Size cols = cols_of(value), stride = value.stride(0);
  Tensor out = empty_beside(value, {rows_of(value), cols}, value.scalar_type());
  for_rows(rows_of(value), cols, [&](Size row, Size count) {
    loops.activate(at(value, row, stride), at(gate, row, stride), at(out, row, cols), activation, count, cols,
                   stride);
  });
  return out;
}

ActivationGradients activate_backward(const Tensor& grad, const Tensor& value, const OptionalTensor& gate,
                                      Activation activation, bool packed) {
  const ScalarType dtype = value.scalar_type();
  const RowLoops& loops = row_loops(dtype, dtype);
  const Size rows = rows_of(value), cols = cols_of(value), stride = value.stride(0);
  Tensor activated = empty_beside(value, {rows, cols}, dtype);
  Tensor dvalue = gate ? empty_beside(value, {rows, stride}, dtype) : grad;
  OptionalTensor dgate;
  if (gate && !packed) dgate = empty_beside(value, {rows, stride}, dtype);
  for_rows(rows, cols, [&](Size row, Size count) {
    char* dv = at(dvalue, row, stride);
    char* dg = packed ? dv : at(dgate, row, stride);
    if (packed) dv += cols * Size(value.element_size());
    loops.activate_backward(at(grad, row, cols), at(value, row, stride), at(gate, row, stride), dv, dg,
                            at(activated, row, cols), activation, count, cols, stride);
  });
  return {dvalue, dgate, activated};
}

Tensor add_scaled(const Tensor& residual, const Tensor& y, const OptionalTensor& layer_scale_,
                  const OptionalTensor& sample_scale_) {
  const RowLoops& loops = row_loops(residual.scalar_type(), y.scalar_type());
  const OptionalTensor layer_scale = wide(layer_scale_, statistics_dtype(y.scalar_type()));
  const OptionalTensor sample_scale = wide(sample_scale_, ScalarType::Double);
  const Size rows = rows_of(y), cols = cols_of(y);
  const Size samples = sample_scale ? sample_scale->size(0) : 1, tokens = rows / std::max<Size>(samples, 1);
  Tensor out = empty_beside(y, {rows, cols}, residual.scalar_type());
  const auto add = [&](Size row, Size count, double factor) {
    loops.add_scaled(at(residual, row, cols), at(y, row, cols), at(out, row, cols), at(layer_scale, 0, 0), factor,
                     count, cols);
  };
  for_rows(rows, cols, [&](Size row, Size count) {
    if (!sample_scale) return add(row, count, 1.0);
    for (const Size end = row + count; row < end;) {
      const Size sample = row / tokens, next = std::min(end, (sample + 1) * tokens);
      add(row, next - row, static_cast<const double*>(sample_scale->const_data_ptr())[sample]);
      row = next;
    }
  });
  return out;
}

Tensor scale_samples(const Tensor& x, const OptionalTensor& sample_scale_, ScalarType dtype) {
  const Tensor rows_in = as_rows(x);
  if (!sample_scale_) return as_dtype(rows_in, dtype);
  const RowLoops& loops = row_loops(x.scalar_type(), dtype);
  const OptionalTensor sample_scale = wide(sample_scale_, ScalarType::Double);
  const Size rows = rows_of(rows_in), cols = cols_of(rows_in), samples = sample_scale->size(0);
  Tensor out = empty_beside(x, {rows, cols}, dtype);
  const Size tokens = rows / std::max<Size>(samples, 1);
  for_rows(samples, tokens * cols, [&](Size first, Size count) {
    for (Size sample = first; sample < first + count; ++sample) {
      loops.scale(at(rows_in, sample * tokens, cols), at(out, sample * tokens, cols),
                  static_cast<const double*>(sample_scale->const_data_ptr())[sample], tokens * cols);
    }
  });
  return out;
}

Tensor scale_rows(const Tensor& weight, const Tensor& scale) {
  const ScalarType dtype = weight.scalar_type();
  const RowLoops& loops = row_loops(dtype, dtype);
  const Tensor factors = *wide(scale, statistics_dtype(dtype)), from = torch::stable::contiguous(weight);
  const Size rows = weight.size(0), cols = weight.dim() == 1 ? 1 : weight.size(1);
  Tensor out = empty_like_as(weight, dtype);
  for_rows(rows, cols, [&](Size row, Size count) {
    loops.scale_rows(at(from, row, cols), at(factors, row, 1), at(out, row, cols), count, cols);
  });
  return out;
}

Tensor row_products(const Tensor& a, const Tensor& b_, const OptionalTensor& c, const OptionalTensor& d,
                    ScalarType dtype) {
  const RowLoops& loops = row_loops(a.scalar_type(), a.scalar_type());
  const ScalarType of_sums = statistics_dtype(a.scalar_type());
  const Tensor b = torch::stable::contiguous(b_);
  const Size rows = rows_of(a), cols = cols_of(a);
  Tensor sums = empty_beside(a, {rows}, of_sums);
  for_rows(rows, cols, [&](Size row, Size count) {
    loops.row_products(at(a, row, cols), at(b, row, cols), at(sums, row, 1), count, cols);
  });
  if (!c) return as_dtype(sums, dtype);
  const Tensor product = scale_rows(as_dtype(*c, of_sums), *d);
  const auto as_row = [&](const Tensor& x) { return torch::stable::view(x, {1, rows}); };
  const Tensor both = add_scaled(as_row(sums), as_row(product), {}, {});
  return as_dtype(torch::stable::view(both, {rows}), dtype);
}

Tensor sum_rows(const Tensor& x) {
  const ScalarType dtype = x.scalar_type(), of_sums = statistics_dtype(dtype);
  const RowLoops& loops = row_loops(dtype, dtype);
  const Size rows = rows_of(x), cols = cols_of(x), chunks = (rows + kChunk - 1) / kChunk;
  Tensor sums = torch::stable::new_zeros(x, {chunks, cols}, of_sums);
  for_rows(chunks, kChunk * cols, [&](Size first, Size count) {
    for (Size chunk = first; chunk < first + count; ++chunk) {
      const Size row = chunk * kChunk;
      loops.sum_rows(at(x, row, cols), at(sums, chunk, cols), std::min(kChunk, rows - row), cols);
    }
  });
  return add_chunks(sums, row_loops(of_sums, of_sums), dtype);
}

Tensor transpose_rows(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  const RowLoops& loops = row_loops(dtype, dtype);
  const Size rows = rows_of(x), cols = cols_of(x);
  Tensor out = empty_beside(x, {cols, rows}, dtype);
  for_rows(cols, rows, [&](Size first, Size count) {
    loops.transpose(x.const_data_ptr(), out.mutable_data_ptr(), rows, cols, first, count);
  });
  return out;
}

}  // namespace fastvit
