// See panels.h. FASTVIT_LEVEL names the vector instructions that this compilation may use.
#include "panels.h"

#include <algorithm>

#include "activations.h"
#include "strip.h"

namespace fastvit::FASTVIT_LEVEL {
namespace {

constexpr Size kLine = 64;  // bytes

struct Identity {
  static float value(float x) { return x; }
};

// Where a strip's sums with a panel go. Before the last part of the depth `out` holds sums.
struct Target {
  float* out;
  const float *bias, *residual;
  Size stride;
  bool first, last;
};

template <typename Function>
void finish(const float (&sums)[kPanel], const Target& to, Size row) {
  float* out = to.out + row * to.stride;
  const float* residual = to.residual ? to.residual + row * to.stride : nullptr;
  if (to.bias && residual) {
    FASTVIT_SIMD
    for (Size i = 0; i < kPanel; ++i) out[i] = residual[i] + Function::value(sums[i] + to.bias[i]);
  } else if (to.bias) {
    FASTVIT_SIMD
    for (Size i = 0; i < kPanel; ++i) out[i] = Function::value(sums[i] + to.bias[i]);
  } else if (residual) {
    FASTVIT_SIMD
    for (Size i = 0; i < kPanel; ++i) out[i] = residual[i] + Function::value(sums[i]);
  } else {
    FASTVIT_SIMD
    for (Size i = 0; i < kPanel; ++i) out[i] = Function::value(sums[i]);
  }
}

template <typename Function>
void run_with(const PanelProduct& p, const PanelShare& share) {
  for (Size begin = 0; begin < p.depth; begin += kPanelDepth) {
    const Size depth = std::min(kPanelDepth, p.depth - begin);
    for (Size n = share.first; n < share.last; ++n) {
      const float* panel = p.panels + (n * p.depth + begin) * kPanel;
      const Size column = n * kPanel;
      // The next panel's part is fetched meanwhile, a strip's share at a time: it comes from memory.
      const char* next = reinterpret_cast<const char*>(panel + (n + 1 < share.last ? p.depth * kPanel : 0));
      const Size lines = depth * kPanel * Size(sizeof(float)) / kLine, strips = (share.rows + kStrip - 1) / kStrip;
      Size line = 0;
      for (Size i = 0; i < share.rows; i += kStrip) {
        for (const Size end = (i / kStrip + 1) * lines / strips; line < end; ++line) {
          __builtin_prefetch(next + line * kLine, 0, 2);
        }
        const Size row = share.row + i, at = row * p.width + column;
        const Target to{p.out + at, p.bias ? p.bias + column : nullptr, p.residual ? p.residual + at : nullptr,
                        p.width, begin == 0, begin + depth == p.depth};
        const auto store = [&](Size j, const Vector& left, const Vector& right) {
          float sums[kPanel];
          store_row(sums, left, right);
          float* out = to.out + j * to.stride;
          if (!to.first) {
            FASTVIT_SIMD
            for (Size lane = 0; lane < kPanel; ++lane) sums[lane] += out[lane];
          }
          if (to.last) {
            finish<Function>(sums, to, j);
          } else {
            std::copy(sums, sums + kPanel, out);
          }
        };
        multiply_strip(std::min(kStrip, share.rows - i), p.x + row * p.depth + begin, p.depth, panel, depth, store);
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
