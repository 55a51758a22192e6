// See panels.h. FASTVIT_LEVEL names the vector instructions that this compilation may use.
#include "panels.h"

#include <algorithm>
#include <type_traits>

#include "activations.h"
#include "strip.h"

namespace fastvit::FASTVIT_LEVEL {
namespace {

struct Identity {
  static float value(float x) { return x; }
};

// A panel's columns of the output: `width` of them, from `column`.
struct Columns {
  Columns(const PanelProduct& product, Size column)
      : p(product), first(column), width(std::min(kWide, p.width - column)) {
    for (Size i = 0; i < kWide; ++i) {
      bias[i] = p.bias && i < width ? p.bias[first + i] : 0.0f;
      scale[i] = p.scale && i < width ? p.scale[first + i] : 1.0f;
    }
  }

  // Sums of a row with the panel's part [begin, begin + depth). Before the last part `out` holds sums.
  template <typename Function, typename Count>
  void take(float* sums, Size row, Size begin, Size depth, Count count) const {
    float* out = p.out + row * p.out_stride + first;
    const float* residual = p.residual ? p.residual + row * p.width + first : nullptr;
    if (begin != 0) {
      FASTVIT_SIMD
      for (Size i = 0; i < count; ++i) sums[i] += out[i];
    }
    if (begin + depth != p.depth) {
      FASTVIT_SIMD
      for (Size i = 0; i < count; ++i) out[i] = sums[i];
    } else if (residual) {
      FASTVIT_SIMD
      for (Size i = 0; i < count; ++i) out[i] = residual[i] + scale[i] * Function::value(sums[i] + bias[i]);
    } else {
      FASTVIT_SIMD
      for (Size i = 0; i < count; ++i) out[i] = scale[i] * Function::value(sums[i] + bias[i]);
    }
  }

  const PanelProduct& p;
  const Size first, width;
  float bias[kWide], scale[kWide];
};

template <typename Function>
void run_with(const PanelProduct& p, const PanelShare& share) {
  alignas(64) float laid[kPanelDepth * kWide];
  const Size strips = (share.rows + kStrip - 1) / kStrip;
  for (Size begin = 0; begin < p.depth; begin += kPanelDepth) {
    const Size depth = std::min(kPanelDepth, p.depth - begin);
    // A panel's part is kWide rows of the weight, `stride` apart; one that was laid out is contiguous.
    const Size stride = p.in_panels ? depth : p.weight_stride;
    const auto part = [&](Size column) {
      return p.weight + (p.in_panels ? column * p.depth + begin * kWide : column * stride + begin);
    };
    for (Size column = share.first; column < share.last; column += kWide) {
      const Columns columns(p, column);
      const float* panel = part(column);
      if (!p.in_panels) {
        interleave(panel, stride, columns.width, depth, laid);
        panel = laid;
      }
      // The next panel's part is fetched meanwhile, a strip's share at a time: it comes from memory.
      const Size rest = share.last - column - kWide, rows_ahead = std::clamp<Size>(rest, 0, kWide);
      const float* ahead = part(column + (rest > 0 ? kWide : 0));
      Size fetched = 0;
      for (Size i = 0; i < share.rows; i += kStrip) {
        for (const Size end = (i / kStrip + 1) * rows_ahead / strips; fetched < end; ++fetched) {
          for (Size step = 0; step < depth; step += 16) __builtin_prefetch(ahead + fetched * stride + step, 0, 2);
        }
        const Size row = share.row + i, height = std::min(kStrip, share.rows - i);
        float sums[kStrip][kWide];
        const auto store = [&](Size j, const Vector& left, const Vector& right) { store_row(sums[j], left, right); };
        multiply_strip(height, p.x + row * p.depth + begin, p.depth, panel, depth, store);
        const auto take = [&](auto count) {
          for (Size j = 0; j < height; ++j) columns.take<Function>(sums[j], row + j, begin, depth, count);
        };
        columns.width == kWide ? take(std::integral_constant<Size, kWide>()) : take(columns.width);
      }
    }
  }
}

}  // namespace

void multiply_panels(const PanelProduct& product, const PanelShare& share) {
  if (!product.activation) return run_with<Identity>(product, share);
  choose_activation<Gelu>(*product.activation, [&](auto function) { run_with<decltype(function)>(product, share); });
}

}  // namespace fastvit::FASTVIT_LEVEL
