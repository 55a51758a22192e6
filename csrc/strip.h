// A few rows by a panel, in a CPU's registers: what panels.cpp and attention_heads.cpp multiply by. Included by
// sources that are compiled once for each level of vector instructions.
#pragma once

#include <algorithm>

#include "panels.h"

#define FASTVIT_SIMD _Pragma("omp simd")

namespace fastvit::FASTVIT_LEVEL {

using Size = std::int64_t;

// Half a row of a panel; two such halves of so many rows' sums are in registers, with room for a row of the panel and a
// number of x. With AVX-512 there would be room for twelve, but rows of x that are a power of two apart would then not
// all have a place in the first level of cache, which has eight.
#if defined(__AVX512F__)
typedef float Vector __attribute__((vector_size(64), aligned(4)));
constexpr Size kStrip = 8;
#else
typedef float Vector __attribute__((vector_size(32), aligned(4)));
constexpr Size kStrip = 6;
#endif
constexpr Size kHalf = sizeof(Vector) / sizeof(float), kWide = 2 * kHalf;

constexpr Size kAhead = 12;  // steps before which a panel is fetched

// The sums of x[row][step] * panel[step][column], where rows of x are `stride` apart: store(row, left, right) gets a
// row's.
template <Size kHeight, typename Store>
inline __attribute__((always_inline)) void multiply_rows(const float* x, Size stride, const float* panel, Size depth,
                                                         const Store& store) {
  const float* rows[kHeight];
  for (Size i = 0; i < kHeight; ++i) rows[i] = x + i * stride;
  Vector sums[kHeight][2] = {};
  for (Size step = 0; step < depth; ++step) {
    __builtin_prefetch(panel + kAhead * kWide);
    const Vector left = *reinterpret_cast<const Vector*>(panel);
    const Vector right = *reinterpret_cast<const Vector*>(panel + kHalf);
#pragma GCC unroll 12
    for (Size i = 0; i < kHeight; ++i) {
      sums[i][0] += rows[i][step] * left;
      sums[i][1] += rows[i][step] * right;
    }
    panel += kWide;
  }
#pragma GCC unroll 12
  for (Size i = 0; i < kHeight; ++i) store(i, sums[i][0], sums[i][1]);
}

// The same of 1 to kStrip rows.
template <Size kHeight = kStrip, typename Store>
void multiply_strip(Size height, const float* x, Size stride, const float* panel, Size depth, const Store& store) {
  if constexpr (kHeight > 1) {
    if (height < kHeight) return multiply_strip<kHeight - 1>(height, x, stride, panel, depth, store);
  }
  multiply_rows<kHeight>(x, stride, panel, depth, store);
}

inline void store_row(float* out, const Vector& left, const Vector& right) {
  *reinterpret_cast<Vector*>(out) = left;
  *reinterpret_cast<Vector*>(out + kHalf) = right;
}

// Four rows, `stride` apart, side by side: four steps of a panel's columns.
inline void interleave_four(const float* rows, Size stride, float* panel) {
  typedef float Four __attribute__((vector_size(16), aligned(4)));
#if defined(__clang__)
#define FASTVIT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
  typedef int Lanes __attribute__((vector_size(16)));
#define FASTVIT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Lanes{__VA_ARGS__})
#endif
  const auto row = [&](Size i) { return *reinterpret_cast<const Four*>(rows + i * stride); };
  const auto step = [&](Size i) -> Four& { return *reinterpret_cast<Four*>(panel + i * kWide); };
  const Four a = row(0), b = row(1), c = row(2), d = row(3);
  const Four ab = FASTVIT_SHUFFLE(a, b, 0, 4, 1, 5), cd = FASTVIT_SHUFFLE(c, d, 0, 4, 1, 5);
  const Four ab_after = FASTVIT_SHUFFLE(a, b, 2, 6, 3, 7), cd_after = FASTVIT_SHUFFLE(c, d, 2, 6, 3, 7);
  step(0) = FASTVIT_SHUFFLE(ab, cd, 0, 1, 4, 5);
  step(1) = FASTVIT_SHUFFLE(ab, cd, 2, 3, 6, 7);
  step(2) = FASTVIT_SHUFFLE(ab_after, cd_after, 0, 1, 4, 5);
  step(3) = FASTVIT_SHUFFLE(ab_after, cd_after, 2, 3, 6, 7);
#undef FASTVIT_SHUFFLE
}

// `width` rows, `stride` apart, as a panel [depth][kWide], with zeros for rows that are not there.
inline void interleave(const float* rows, Size stride, Size width, Size depth, float* panel) {
  constexpr Size kLine = 16;  // floats: each row's are read while they are near, as rows may lie in each other's place
  Size step = 0;
  for (; width == kWide && step + kLine <= depth; step += kLine) {
    for (Size i = 0; i < kWide; i += 4) {
#pragma GCC unroll 4
      for (Size j = step; j < step + kLine; j += 4) {
        interleave_four(rows + i * stride + j, stride, panel + j * kWide + i);
      }
    }
  }
  for (; step < depth; ++step) {
    float* to = panel + step * kWide;
    for (Size i = 0; i < width; ++i) to[i] = rows[i * stride + step];
    std::fill(to + width, to + kWide, 0.0f);
  }
}

}  // namespace fastvit::FASTVIT_LEVEL
