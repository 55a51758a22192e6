// Mean and spread of a row, put together from those of its parts: what a product leaves in its epilogue, so that the
// norm after it need not read the row again.
//
// A part is kMomentColumns columns of a row (the last may be fewer), and for it two numbers are kept: its mean, and the
// sum of the squares of what is left after that mean. Sums of plain squares would lose the spread where the mean is
// many times as large. Parts are joined by Chan's formula (Chan, Golub, LeVeque 1979), in the order of their columns.
#pragma once

#include <cstdint>

#include "fragments.h"
#include "row_norm.h"

namespace fastvit {

constexpr int kMomentColumns = 64;

// Parts of a row of so many columns.
FASTVIT_HOST_DEVICE constexpr std::int64_t moment_parts(std::int64_t columns) {
  return (columns + kMomentColumns - 1) / kMomentColumns;
}

template <typename T>
struct Moments {
  T count, mean, squares;
};

// On a GPU to two units in the last place: a division to the last bit is a call.
FASTVIT_HOST_DEVICE float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
FASTVIT_HOST_DEVICE double quotient(double a, double b) { return a / b; }

// Of the numbers of both; b may be of none.
template <typename T>
FASTVIT_HOST_DEVICE Moments<T> joined(const Moments<T>& a, const Moments<T>& b) {
  const T count = a.count + b.count, apart = b.mean - a.mean, share = quotient(b.count, count);
  return {count, a.mean + apart * share, a.squares + (b.squares + apart * apart * (a.count * share))};
}

// Of a part of a row, `count` columns of which are there, spread over the four lanes of a row in a product of a warp
// group: a lane holds eight numbers of 32 (fragments.h). Whole eights of columns are there or not.
// exchange(number, distance) is that of the lane whose number differs by a bit.
template <typename Exchange>
FASTVIT_DEVICE Moments<float> moments_over_lanes(const float (&x)[kHeldColumns], int count, const Exchange& exchange) {
  const auto over_lanes = [&](float sum) {
    sum += exchange(sum, 1);
    return sum + exchange(sum, 2);
  };
  float sum = 0.0f, squares = 0.0f;
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int i = 0; i < kHeldColumns; ++i) {
    if (column_at_place(i) < count) sum += x[i];
  }
  const float mean = quotient(over_lanes(sum), float(count > 0 ? count : 1));
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int i = 0; i < kHeldColumns; ++i) {
    if (column_at_place(i) < count) squares = fmaf(x[i] - mean, x[i] - mean, squares);
  }
  return {float(count), mean, over_lanes(squares)};
}

// As wide as an epilogue's own tiles, which it comes to from left to right.
constexpr int kTileColumns = 32;

// Takes the next such tile of a row into what is held of a part, columns_left of them being there from the first tile
// on. True where the part is complete: then its moments are what is held.
template <typename Exchange>
FASTVIT_DEVICE bool take_tile(Moments<float>& held, const float (&x)[kHeldColumns], int tile, int columns_left,
                              const Exchange& exchange) {
  constexpr int kTogether = kMomentColumns / kTileColumns;
  const int left = columns_left - tile * kTileColumns;
  const Moments<float> own =
      moments_over_lanes(x, left < 0 ? 0 : left < kTileColumns ? left : kTileColumns, exchange);
  held = tile % kTogether == 0 ? own : joined(held, own);
  return tile % kTogether == kTogether - 1 && left > kTileColumns - kMomentColumns;
}

// Of numbers one after the other, at least one.
template <typename T, typename Load>
FASTVIT_HOST_DEVICE Moments<T> moments_of(std::int64_t count, const Load& load) {
  T sum = 0, left = 0, squares = 0;
  for (std::int64_t i = 0; i < count; ++i) sum += load(i);
  const T mean = quotient(sum, T(count));
  for (std::int64_t i = 0; i < count; ++i) {
    const T apart = load(i) - mean;
    left += apart;
    squares += apart * apart;
  }
  // The mean is rounded: what it left in the numbers is taken off once more.
  const T rest = quotient(left, T(count)), spread = squares - left * rest;
  return {T(count), mean + rest, spread < T(0) ? T(0) : spread};
}

// Of a row of `columns` numbers from its parts: load(part, mean, squares).
template <typename T, typename Load>
FASTVIT_HOST_DEVICE Moments<T> joined_moments(std::int64_t columns, const Load& load) {
  Moments<T> row{T(0), T(0), T(0)};
  for (std::int64_t part = 0; part < moment_parts(columns); ++part) {
    const std::int64_t left = columns - part * kMomentColumns;
    Moments<T> one{T(left < kMomentColumns ? left : kMomentColumns), T(0), T(0)};
    load(part, one.mean, one.squares);
    row = part == 0 ? one : joined(row, one);
  }
  return row;
}

// What a norm takes from a row: of LayerNorm the mean and the deviation, of RMSNorm the root of the mean square.
template <typename T>
FASTVIT_HOST_DEVICE RowStatistics<T> statistics_from(const Moments<T>& row, T eps, bool rms) {
  const T variance = quotient(row.squares, row.count);
  return {rms ? T(0) : row.mean, T(0), inverse_root((rms ? variance + row.mean * row.mean : variance) + eps)};
}

}  // namespace fastvit
