// See panels.h. FASTVIT_LEVEL names the vector instructions that this compilation may use.
#include "panels.h"

#include <algorithm>

#include "activations.h"

#define FASTVIT_SIMD _Pragma("omp simd")

namespace fastvit::FASTVIT_LEVEL {
namespace {

using Size = std::int64_t;
// A strip by a panel: twelve vectors of sums, two of the panel, one of x.
typedef float Vector __attribute__((vector_size(32), aligned(4)));  // half a row of a panel

constexpr Size kAhead = 12;   // steps before which a panel is fetched
constexpr Size kLine = 64;    // bytes

struct Identity {
  static float value(float x) { return x; }
};

// Rows of x from `row`, columns from `column`, as strips: [rows / 6][depth][6], the last one of what is left.
void pack(const float* x, Size stride, Size rows, Size depth, float* strips) {
  for (Size row = 0; row < rows; row += kStrip) {
    const Size height = std::min(kStrip, rows - row);
    for (Size step = 0; step < depth; ++step) {
      for (Size i = 0; i < height; ++i) *strips++ = x[(row + i) * stride + step];
    }
  }
}

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

// A strip of kHeight rows by a panel.
template <Size kHeight, typename Function>
void multiply(const float* strip, const float* panel, Size depth, const Target& to) {
  Vector sums[kHeight][2] = {};
  for (Size step = 0; step < depth; ++step) {
    __builtin_prefetch(panel + kAhead * kPanel);
    const Vector left = *reinterpret_cast<const Vector*>(panel), right = *reinterpret_cast<const Vector*>(panel + 8);
#pragma GCC unroll 6
    for (Size i = 0; i < kHeight; ++i) {
      sums[i][0] += strip[i] * left;
      sums[i][1] += strip[i] * right;
    }
    strip += kHeight;
    panel += kPanel;
  }
#pragma GCC unroll 6
  for (Size i = 0; i < kHeight; ++i) {
    float row[kPanel];
    *reinterpret_cast<Vector*>(row) = sums[i][0];
    *reinterpret_cast<Vector*>(row + 8) = sums[i][1];
    float* out = to.out + i * to.stride;
    if (!to.first) {
      FASTVIT_SIMD
      for (Size j = 0; j < kPanel; ++j) row[j] += out[j];
    }
    if (to.last) {
      finish<Function>(row, to, i);
    } else {
      std::copy(row, row + kPanel, out);
    }
  }
}

template <typename Function>
void multiply_any(Size height, const float* strip, const float* panel, Size depth, const Target& to) {
  switch (height) {
    case 1: return multiply<1, Function>(strip, panel, depth, to);
    case 2: return multiply<2, Function>(strip, panel, depth, to);
    case 3: return multiply<3, Function>(strip, panel, depth, to);
    case 4: return multiply<4, Function>(strip, panel, depth, to);
    case 5: return multiply<5, Function>(strip, panel, depth, to);
    default: return multiply<kStrip, Function>(strip, panel, depth, to);
  }
}

template <typename Function>
void run_with(const PanelProduct& p, const PanelShare& share, float* scratch) {
  for (Size begin = 0; begin < p.depth; begin += kPanelDepth) {
    const Size depth = std::min(kPanelDepth, p.depth - begin);
    pack(p.x + share.row * p.depth + begin, p.depth, share.rows, depth, scratch);
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
        const Size at = (share.row + i) * p.width + column;
        const Target to{p.out + at, p.bias ? p.bias + column : nullptr, p.residual ? p.residual + at : nullptr,
                        p.width, begin == 0, begin + depth == p.depth};
        multiply_any<Function>(std::min(kStrip, share.rows - i), scratch + i * depth, panel, depth, to);
      }
    }
  }
}

}  // namespace

void multiply_panels(const PanelProduct& product, const PanelShare& share, float* scratch) {
  if (!product.activation) return run_with<Identity>(product, share, scratch);
  choose_activation<Gelu>(*product.activation, [&](auto function) {
    run_with<decltype(function)>(product, share, scratch);
  });
}

}  // namespace fastvit::FASTVIT_LEVEL
