// rows.h on a CPU: memory, threads, and which loops. Sums over rows go by chunks of a fixed size that are added
// in order, so that they do not depend on the number of threads.
#include <algorithm>

#include "row_loops.h"
#include "scope.h"
#include "shares.h"

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
constexpr Size kElementsAShare = 1 << 14;  // fewer are not worth waking another thread

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
  const auto divide = [](Size whole, Size part) { return (whole + part - 1) / part; };
  const Size least = std::max<Size>(1, kElementsAShare / std::max<Size>(cols, 1));
  const Size together = std::max(least, divide(rows, torch::stable::get_num_threads() * kSharesAThread));
  share_out(divide(rows, together), [&](Size share, Size) {
    function(share * together, std::min(together, rows - share * together));
  });
}

OptionalTensor wide(const OptionalTensor& x, ScalarType dtype) {
  if (!x) return x;
  return packed(as_dtype(*x, dtype));
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

// A factor for each of the samples that rows belong to, or 1.
class SampleScale {
 public:
  SampleScale(const OptionalTensor& scale, Size rows)
      : scale_(wide(scale, ScalarType::Double)), tokens_(scale ? rows / std::max<Size>(scale->size(0), 1) : rows) {}

  // Calls use(first, some, factor) for the rows of each sample among `count` from `row` on.
  template <typename Use>
  void each(Size row, Size count, Use use) const {
    if (!scale_) return use(row, count, 1.0);
    for (const Size end = row + count; row < end;) {
      const Size sample = row / tokens_, next = std::min(end, (sample + 1) * tokens_);
      use(row, next - row, static_cast<const double*>(scale_->const_data_ptr())[sample]);
      row = next;
    }
  }

 private:
  OptionalTensor scale_;
  Size tokens_;
};

// Sums [C, D] of chunks of rows, one for each kChunk of them: add(sum, row, count) adds some rows to a sum [D].
template <typename Add>
Tensor sum_chunks(const Tensor& beside, Size rows, Size cols, ScalarType of_sums, Add add) {
  const Size chunks = std::max<Size>((rows + kChunk - 1) / kChunk, 1);
  Tensor sums = torch::stable::new_zeros(beside, {chunks, cols}, of_sums);
  for_rows(chunks, kChunk * cols, [&](Size first, Size count) {
    for (Size chunk = first; chunk < first + count; ++chunk) {
      const Size row = chunk * kChunk;
      if (row < rows) add(at(sums, chunk, cols), row, std::min(kChunk, rows - row));
    }
  });
  return sums;
}

// [D] in dtype: the sum of rows that are sums, chunk by chunk again until one is left, so that no chain of
// additions is long.
Tensor add_up(Tensor sums, ScalarType dtype) {
  const RowLoops& loops = row_loops(sums.scalar_type(), sums.scalar_type());
  const Size cols = cols_of(sums);
  while (rows_of(sums) != 1) {
    sums = sum_chunks(sums, rows_of(sums), cols, sums.scalar_type(), [&](void* sum, Size row, Size count) {
      loops.sum_rows(at(sums, row, cols), sum, count, cols);
    });
  }
  return as_dtype(viewed(sums, {cols}), dtype);
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
  if (needs_weight) gradients.weight = add_up(*weight_sums, norm.weight->scalar_type());
  if (needs_bias) gradients.bias = add_up(*bias_sums, norm.bias->scalar_type());
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
  const Size rows = rows_of(y), cols = cols_of(y);
  const SampleScale factors(sample_scale_, rows);
  Tensor out = empty_beside(y, {rows, cols}, residual.scalar_type());
  for_rows(rows, cols, [&](Size row, Size count) {
    factors.each(row, count, [&](Size first, Size some, double factor) {
      loops.add_scaled(at(residual, first, cols), at(y, first, cols), at(out, first, cols),
                       at(layer_scale, 0, 0), factor, some, cols);
    });
  });
  return out;
}

Tensor scale(const Tensor& x, const OptionalTensor& layer_scale_, const OptionalTensor& sample_scale_,
             ScalarType dtype) {
  const Tensor from = as_rows(x);
  if (!layer_scale_ && !sample_scale_) return as_dtype(from, dtype);
  const RowLoops& loops = row_loops(x.scalar_type(), dtype);
  const OptionalTensor layer_scale = wide(layer_scale_, statistics_dtype(dtype));
  const SampleScale factors(sample_scale_, rows_of(from));
  const Size rows = rows_of(from), cols = cols_of(from);
  Tensor out = empty_beside(x, {rows, cols}, dtype);
  for_rows(rows, cols, [&](Size row, Size count) {
    factors.each(row, count, [&](Size first, Size some, double factor) {
      loops.scale(at(from, first, cols), at(out, first, cols), at(layer_scale, 0, 0), factor, some, cols);
    });
  });
  return out;
}

Tensor sum_products(const Tensor& a_, const Tensor& b_, ScalarType dtype) {
  const Tensor a = packed(a_), b = packed(b_);
  const RowLoops& loops = row_loops(a.scalar_type(), a.scalar_type());
  const Size rows = rows_of(a), cols = cols_of(a);
  const auto add = [&](void* sum, Size row, Size count) {
    loops.sum_products(at(a, row, cols), at(b, row, cols), sum, count, cols);
  };
  return add_up(sum_chunks(a, rows, cols, statistics_dtype(a.scalar_type()), add), dtype);
}

Tensor sum_rows(const Tensor& x) {
  const RowLoops& loops = row_loops(x.scalar_type(), x.scalar_type());
  const Size rows = rows_of(x), cols = cols_of(x);
  const auto add = [&](void* sum, Size row, Size count) { loops.sum_rows(at(x, row, cols), sum, count, cols); };
  return add_up(sum_chunks(x, rows, cols, statistics_dtype(x.scalar_type()), add), x.scalar_type());
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
