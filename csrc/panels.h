// A product of float32 on a CPU with a weight in panels: out = activation(x weight^T + bias) + residual.
//
// A panel is sixteen of the weight's rows, one column after the other: [D / 16, K, 16]. Six rows of x by a panel are
// what the registers of AVX2 hold, and every number of both is read from a cache that is near: rows of x, where they
// lie, from the second level, a panel's part from the first. On such a CPU that reaches nine tenths of its peak,
// where MKL and oneDNN reach seven. With AVX-512 oneDNN does, and has the product.
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

// Of a share's x and panels, so much is read again and again at a time: 204 KB and 16 KB.
constexpr std::int64_t kPanelRows = 204, kPanelDepth = 256;

// At most kPanelRows rows from `row`, by the panels [first, last). No number depends on how a product is shared out.
struct PanelShare {
  std::int64_t row, rows, first, last;
};

// On one thread. One namespace for each level of vector instructions that panels.cpp was compiled for.
namespace base {
void multiply_panels(const PanelProduct& product, const PanelShare& share);
}
namespace v3 {
void multiply_panels(const PanelProduct& product, const PanelShare& share);
}

}  // namespace fastvit
