// What becomes of the few numbers of a product that one thread holds, before they are rounded to half precision.
//
// A fragment is an array of floats with a static size(). Which activation it is, is asked once a fragment: the
// branch costs little, and one kernel then serves every activation.
//
// The product of a warp group has a thread hold, of 32 columns, two rows of eight: pairs, every eighth. The eight
// lanes whose numbers are a multiple of four apart hold the same columns.
#pragma once

#include "activation_names.h"
#include "activations.h"

namespace fastvit {

// activation(x).
template <typename Fragment>
FASTVIT_HOST_DEVICE Fragment activated_fragment(const Fragment& x, Activation activation) {
  Fragment y;
  choose_activation<GeluHalf>(activation, [&](auto function) {
    for (int i = 0; i < int(x.size()); ++i) y[i] = decltype(function)::value(x[i]);
  });
  return y;
}

// grad activation'(x), and activation(x) beside it, which shares its exponential.
template <typename Fragment>
FASTVIT_HOST_DEVICE Fragment differentiated_fragment(const Fragment& grad, const Fragment& x, Activation activation,
                                                     Fragment& activated) {
  Fragment dx;
  choose_activation<GeluHalf>(activation, [&](auto function) {
    for (int i = 0; i < int(x.size()); ++i) {
      float slope;
      activated[i] = decltype(function)::both(x[i], slope);
      dx[i] = grad[i] * slope;
    }
  });
  return dx;
}

// What is left to do of a norm that is folded into the weight of a product with rows as they are: their mean is taken
// off by one rounding, as large as it may be, then they are scaled. `sums` are those of the weight's rows.
template <typename Fragment>
FASTVIT_HOST_DEVICE Fragment normalized_fragment(const Fragment& product, const Fragment& mean, const Fragment& rstd,
                                                 const Fragment& sums, const Fragment& bias) {
  Fragment y;
  for (int i = 0; i < int(product.size()); ++i) {
    y[i] = fmaf(fmaf(-mean[i], sums[i], product[i]), rstd[i], bias[i]);
  }
  return y;
}

constexpr int kHeld = 16, kHeldColumns = 8, kLanesApart = 4;

// A place among the columns held, from the column's distance to the first, and back.
FASTVIT_HOST_DEVICE constexpr int place_of_column(int column) { return column / 8 * 2 + column % 2; }
FASTVIT_HOST_DEVICE constexpr int column_at_place(int place) { return place / 2 * 8 + place % 2; }

// sums[place] over the eight lanes with the same columns, `place` being the lane's number among them. Half of what
// is left is exchanged at each step: exchange(number, distance) is that of the lane whose place differs by a bit.
template <typename Exchange>
FASTVIT_DEVICE float sum_over_lanes(float (&sums)[kHeldColumns], int place, const Exchange& exchange) {
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int half = kHeldColumns / 2; half > 0; half /= 2) {
    const bool upper = place & half;
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int i = 0; i < half; ++i) {
      const float sent = upper ? sums[i] : sums[i + half], kept = upper ? sums[i + half] : sums[i];
      sums[i] = kept + exchange(sent, half);
    }
  }
  return sums[0];
}

}  // namespace fastvit
