// A product of float32 on a CPU with a weight in panels: out = activation(x weight^T + bias) + residual.
//
// A panel is sixteen of the weight's rows, one column after the other: [D / 16, K, 16]. Six rows of x by a panel are
// what the registers of AVX2 hold, and every number of both is read from a cache that is near: x in strips of six
// that a level-two cache holds, a panel's part in the first level. On such a CPU that reaches nine tenths of its
// peak, where MKL and oneDNN reach seven. With AVX-512 oneDNN does, and has the product.
#pragma once

#include <cstdint>
#include <optional>

#include "activation_names.h"

namespace fastvit {

constexpr std::int64_t kPanel = 16, kStrip = 6;

// Contiguous; bias and residual may be null, and residual may not be out.
struct PanelProduct {
  const float *x, *panels, *bias, *residual;
  float* out;
  std::int64_t rows, depth, width;
  std::optional<Activation> activation;
};

// Rows of x by columns that one thread holds as strips: 204 KB of a level-two cache, and of a panel 16 KB of a
// level-one cache.
constexpr std::int64_t kPanelRows = 204, kPanelDepth = 256;

// At most kPanelRows rows from `row`, by the panels [first, last). No number depends on how a product is shared out.
struct PanelShare {
  std::int64_t row, rows, first, last;
};

// One namespace for each level of vector instructions that panels.cpp was compiled for. On one thread, with
// kPanelRows * kPanelDepth floats beside.
namespace base {
void multiply_panels(const PanelProduct& product, const PanelShare& share, float* scratch);
}
namespace v3 {
void multiply_panels(const PanelProduct& product, const PanelShare& share, float* scratch);
}

}  // namespace fastvit
