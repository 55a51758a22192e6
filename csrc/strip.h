// Up to six rows by a panel of sixteen columns, in the registers of AVX2: what panels.cpp and attention_heads.cpp
// multiply by. Included by sources that are compiled once for each level of vector instructions.
#pragma once

#include "panels.h"

#define FASTVIT_SIMD _Pragma("omp simd")

namespace fastvit::FASTVIT_LEVEL {

using Size = std::int64_t;
typedef float Vector __attribute__((vector_size(32), aligned(4)));  // half a row of a panel

constexpr Size kAhead = 12;  // steps before which a panel is fetched

// The sums of x[row][step] * panel[step][column], where rows of x are `stride` apart: store(row, left, right) gets a
// row's. Twelve vectors of sums, two of the panel and one of x are what AVX2 has room for.
template <Size kHeight, typename Store>
inline __attribute__((always_inline)) void multiply_strip(const float* x, Size stride, const float* panel, Size depth,
                                                          const Store& store) {
  const float* rows[kHeight];
  for (Size i = 0; i < kHeight; ++i) rows[i] = x + i * stride;
  Vector sums[kHeight][2] = {};
  for (Size step = 0; step < depth; ++step) {
    __builtin_prefetch(panel + kAhead * kPanel);
    const Vector left = *reinterpret_cast<const Vector*>(panel), right = *reinterpret_cast<const Vector*>(panel + 8);
#pragma GCC unroll 6
    for (Size i = 0; i < kHeight; ++i) {
      sums[i][0] += rows[i][step] * left;
      sums[i][1] += rows[i][step] * right;
    }
    panel += kPanel;
  }
#pragma GCC unroll 6
  for (Size i = 0; i < kHeight; ++i) store(i, sums[i][0], sums[i][1]);
}

// The same of 1 to kStrip rows.
template <typename Store>
void multiply_strip(Size height, const float* x, Size stride, const float* panel, Size depth, const Store& store) {
  switch (height) {
    case 1: return multiply_strip<1>(x, stride, panel, depth, store);
    case 2: return multiply_strip<2>(x, stride, panel, depth, store);
    case 3: return multiply_strip<3>(x, stride, panel, depth, store);
    case 4: return multiply_strip<4>(x, stride, panel, depth, store);
    case 5: return multiply_strip<5>(x, stride, panel, depth, store);
    default: return multiply_strip<kStrip>(x, stride, panel, depth, store);
  }
}

inline void store_row(float* out, const Vector& left, const Vector& right) {
  *reinterpret_cast<Vector*>(out) = left;
  *reinterpret_cast<Vector*>(out + 8) = right;
}

}  // namespace fastvit::FASTVIT_LEVEL
