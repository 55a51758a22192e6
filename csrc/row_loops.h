// The loops over rows of the CPU library, on plain memory. row_loops.cpp is compiled once for each level of
// vector instructions, and row_loops() takes the highest that this machine has.
//
// Types are erased: a table of functions is for rows of one input and one output dtype, and numbers between
// them are float, or double for double. Every function works on `rows` rows of `cols`, on one thread.
#pragma once

#include <cstdint>

#include "rows.h"

namespace fastvit {

using Size = std::int64_t;

// What a loop reads of a norm; Wide is float or double by the table's dtypes, weight and bias may be null.
struct NormArrays {
  const void *weight, *bias;
  double eps;
  bool rms;
};

struct RowLoops {
  // Input rows to output rows; mean and rstd are written, mean only for LayerNorm.
  void (*norm)(const void* x, void* out, void* mean, void* rstd, const NormArrays& norm, Size rows, Size cols);
  void (*renorm)(const void* x, void* out, const void* mean, const void* rstd, const NormArrays& norm, Size rows,
                 Size cols);
  // grad is in the output's dtype; dx and beside in the input's. Null is what is not there or not needed.
  // weight_sum and bias_sum [cols] are added to.
  void (*norm_backward)(const void* grad, const void* x, const void* mean, const void* rstd,
                        const NormArrays& norm, const void* beside, void* dx, void* weight_sum, void* bias_sum,
                        Size rows, Size cols);
  // residual and out are in the input's dtype, y in the output's: out = residual + factor * scale * y.
  void (*add_scaled)(const void* residual, const void* y, void* out, const void* scale, double factor, Size rows,
                     Size cols);
  // From the input's dtype to the output's; scale [cols] may be null.
  void (*scale)(const void* x, void* out, const void* scale, double factor, Size rows, Size cols);

  // These are on rows of the output's dtype alone.
  void (*activate)(const void* value, const void* gate, void* out, Activation activation, Size rows, Size cols,
                   Size stride);
  void (*activate_backward)(const void* grad, const void* value, const void* gate, void* dvalue, void* dgate,
                            void* activated, Activation activation, Size rows, Size cols, Size stride);
  // sum [cols] is added to.
  void (*sum_products)(const void* a, const void* b, void* sum, Size rows, Size cols);
  void (*sum_rows)(const void* x, void* sum, Size rows, Size cols);
  // Columns [first, first + count) of x [rows, cols] become rows of out [cols, rows].
  void (*transpose)(const void* x, void* out, Size rows, Size cols, Size first, Size count);
};

const RowLoops& row_loops(ScalarType input, ScalarType output);

// x [T, D] as [D, T], in new memory.
Tensor transpose_rows(const Tensor& x);

}  // namespace fastvit
