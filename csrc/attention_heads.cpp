// See attention_heads.h. FASTVIT_LEVEL names the vector instructions that this compilation may use.
#include "attention_heads.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "activations.h"
#include "strip.h"

namespace fastvit::FASTVIT_LEVEL {
namespace {

// Up to sixteen rows, side by side.
template <typename Width>
inline void interleave(const float* rows, Size stride, Width width, Size depth, float* panel) {
  for (Size step = 0; step < depth; ++step, panel += kPanel) {
    for (Size i = 0; i < width; ++i) panel[i] = rows[i * stride + step];
    for (Size i = width; i < kPanel; ++i) panel[i] = 0.0f;
  }
}

// Rows [columns, depth] as panels [columns / 16][depth][16], with zeros behind the last.
void pack_rows(const float* rows, Size stride, Size columns, Size depth, float* panels) {
  for (Size first = 0; first < columns; first += kPanel, panels += depth * kPanel, rows += kPanel * stride) {
    if (columns - first >= kPanel) {
      interleave(rows, stride, std::integral_constant<Size, kPanel>(), depth, panels);
    } else {
      interleave(rows, stride, columns - first, depth, panels);
    }
  }
}

// Rows [depth, columns] as panels [columns / 16][depth][16], likewise.
void pack_columns(const float* rows, Size stride, Size columns, Size depth, float* panels) {
  for (Size first = 0; first < columns; first += kPanel) {
    const Size width = std::min(kPanel, columns - first);
    for (Size step = 0; step < depth; ++step, panels += kPanel) {
      const float* row = rows + step * stride + first;
      std::copy(row, row + width, panels);
      std::fill(panels + width, panels + kPanel, 0.0f);
    }
  }
}

// A row of logits to e^(x - max) in place; returns one by their sum, or zero where there is no key left.
float exponentials(float* logits, Size padded) {
  float lanes[kPanel];
  std::copy(logits, logits + kPanel, lanes);
  for (Size j = kPanel; j < padded; j += kPanel) {
    FASTVIT_SIMD
    for (Size i = 0; i < kPanel; ++i) lanes[i] = logits[j + i] > lanes[i] ? logits[j + i] : lanes[i];
  }
  const auto fold = [&](auto join) {  // to lanes[0]
    for (Size half = kPanel / 2; half > 0; half /= 2) {
      FASTVIT_SIMD
      for (Size i = 0; i < half; ++i) lanes[i] = join(lanes[i], lanes[i + half]);
    }
    return lanes[0];
  };
  float largest = fold([](float a, float b) { return b > a ? b : a; });
  if (largest == -INFINITY) largest = 0.0f;
  std::fill(lanes, lanes + kPanel, 0.0f);
  for (Size j = 0; j < padded; j += kPanel) {
    FASTVIT_SIMD
    for (Size i = 0; i < kPanel; ++i) {
      const float x = logits[j + i] - largest, within = exponential_within(x < -87.0f ? -87.0f : x);
      const float power = x < -87.0f ? 0.0f : within;
      logits[j + i] = power;
      lanes[i] += power;
    }
  }
  const float sum = fold([](float a, float b) { return a + b; });
  return sum == 0.0f ? 0.0f : 1.0f / sum;
}

struct Block {
  const AttentionHead& head;
  Size first, queries;            // at most kQueries
  const float *keys, *values;     // panels
  float* logits;                  // [queries, padded]
  Size seen, padded;              // keys by one query at least; and up to whole panels

  void run() const {
    score();
    float inverse[kQueries];
    for (Size i = 0; i < queries; ++i) {
      float* row = logits + i * padded;
      hide(row, first + i);
      inverse[i] = exponentials(row, padded);
    }
    average(inverse);
  }

  void score() const {
    for (Size key = 0; key < padded; key += kPanel) {
      for (Size i = 0; i < queries; i += kStrip) {
        const auto store = [&](Size j, const Vector& left, const Vector& right) {
          store_row(logits + (i + j) * padded + key, left * head.scale, right * head.scale);
        };
        multiply_strip(std::min(kStrip, queries - i), head.q + (first + i) * head.q_stride, head.q_stride,
                       keys + key * head.channels, head.channels, store);
      }
    }
  }

  // Adds the mask, and takes out keys that a query does not see.
  void hide(float* row, Size query) const {
    if (head.mask) {
      const float* mask = head.mask + query * head.mask_row;
      for (Size key = 0; key < seen; ++key) row[key] += mask[key * head.mask_column];
    }
    std::fill(row + (head.causal ? std::min(seen, query + 1) : seen), row + padded, -INFINITY);
  }

  void average(const float* inverse) const {
    for (Size channel = 0; channel < head.channels; channel += kPanel) {
      const Size width = std::min(kPanel, head.channels - channel);
      for (Size i = 0; i < queries; i += kStrip) {
        const auto store = [&](Size j, const Vector& left, const Vector& right) {
          float* out = head.out + (first + i + j) * head.out_stride + channel;
          const Vector a = left * inverse[i + j], b = right * inverse[i + j];
          if (width == kPanel) return store_row(out, a, b);
          float row[kPanel];
          store_row(row, a, b);
          std::copy(row, row + width, out);
        };
        multiply_strip(std::min(kStrip, queries - i), logits + i * padded, padded, values + channel * head.keys,
                       seen, store);
      }
    }
  }
};

}  // namespace

void attend(const AttentionHead& head, Size first, Size last, float* scratch) {
  float* keys = scratch;
  float* values = keys + whole_panels(head.keys) * head.channels;
  float* logits = values + whole_panels(head.channels) * head.keys;
  pack_rows(head.k, head.k_stride, head.keys, head.channels, keys);
  pack_columns(head.v, head.v_stride, head.channels, head.keys, values);
  for (Size query = first; query < last; query += kQueries) {
    const Size queries = std::min(kQueries, last - query);
    const Size seen = head.causal ? std::min(head.keys, query + queries) : head.keys;
    Block{head, query, queries, keys, values, logits, seen, whole_panels(seen)}.run();
  }
}

}  // namespace fastvit::FASTVIT_LEVEL
