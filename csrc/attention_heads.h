// Attention of one head in float32 on a CPU: softmax(scale q k^T + mask) v, by the products of strip.h.
//
// Keys are laid out once as panels of sixteen keys [M / 16][d][16], values as panels of sixteen channels
// [d / 16][M][16]. Then twenty-four queries at a time: their logits with every key, which a near cache holds, the
// softmax of each row over all of it, and its product with the values. Nothing is computed online, so no sum depends
// on how the queries are shared out.
#pragma once

#include <cstdint>

#include "panels.h"

namespace fastvit {

// q [N, d], k and v [M, d], out [N, d]: channels are contiguous, rows so many floats apart. The mask [N, M], which
// may be null, is added.
struct AttentionHead {
  const float *q, *k, *v, *mask;
  float* out;
  std::int64_t q_stride, k_stride, v_stride, out_stride, mask_row, mask_column;
  std::int64_t queries, keys, channels;
  float scale;
  bool causal;  // query i sees keys 0..i
};

constexpr std::int64_t kQueries = 24;

// Columns with those that fill the last panel.
constexpr std::int64_t whole_panels(std::int64_t columns) { return (columns + kPanel - 1) / kPanel * kPanel; }

// Floats that a call needs beside: keys, logits, values.
constexpr std::int64_t attention_scratch(std::int64_t keys, std::int64_t channels) {
  return whole_panels(keys) * (channels + kQueries) + whole_panels(channels) * keys;
}

// Queries [first, last), on one thread. One namespace for each level of vector instructions.
namespace base {
void attend(const AttentionHead& head, std::int64_t first, std::int64_t last, float* scratch);
}
namespace v3 {
void attend(const AttentionHead& head, std::int64_t first, std::int64_t last, float* scratch);
}

}  // namespace fastvit
