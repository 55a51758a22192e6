// A product of float32 on a CPU: out = residual + scale * activation(x weight^T + bias).
//
// A panel is sixteen of the weight's rows, or thirty-two with AVX-512, one column after the other: [K, 16]. Six rows
// of x by a panel (eight by the wider one) have their sums in registers, and every number of both is read from a cache
// that is near: rows of x, where they lie, from the second level, a panel's part from the first. With AVX2 that reaches
// nine tenths of the peak, where MKL and oneDNN reach seven or eight.
//
// The weight is read as it is, [D, K]: a panel's part is laid out when a share's rows are to be multiplied by it, which
// takes as long as four to six of the rows (docs/notes/row_major_products.md). Or it was laid out before, in panels of
// sixteen rows [D / 16, K, 16].
#pragma once

#include <cstdint>
#include <optional>

#include "activation_names.h"

namespace fastvit {

constexpr std::int64_t kPanel = 16;

// x [rows, depth] and residual [rows, width] are contiguous, bias and scale are [width]; these three may be null, and
// residual may not be out. Rows of the weight and of out are so many floats apart.
struct PanelProduct {
  const float *x, *weight, *bias, *scale, *residual;
  float* out;
  std::int64_t rows, depth, width, weight_stride, out_stride;
  bool in_panels;
  std::optional<Activation> activation;
};

// A share begins at a multiple of so many columns, and has whole strips of rows, whatever the level; of its x and
// panels so much is read again and again at a time: 216 KB and 16 or 32 KB.
constexpr std::int64_t kShareColumns = 32, kShareRows = 24, kPanelRows = 216, kPanelDepth = 256;

// At most kPanelRows rows from `row`, by the columns [first, last). No number depends on how a product is shared out.
struct PanelShare {
  std::int64_t row, rows, first, last;
};

// On one thread. One namespace for each level of vector instructions that panels.cpp was compiled for; v4 takes no
// weight in panels.
namespace base {
void multiply_panels(const PanelProduct& product, const PanelShare& share);
}
namespace v3 {
void multiply_panels(const PanelProduct& product, const PanelShare& share);
}
namespace v4 {
void multiply_panels(const PanelProduct& product, const PanelShare& share);
}

}  // namespace fastvit
