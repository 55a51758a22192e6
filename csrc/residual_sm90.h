// The product that ends half a block, on Hopper, as the host calls it: out = residual + scale (x W^T + bias), and beside
// it the moments of out's rows (row_moments.h), from the numbers as they are rounded.
//
// Everything is in one dtype of half precision and contiguous; moments are in float32.
#pragma once

#include "fc1_sm90.h"

namespace fastvit {

struct Residual {
  Extent out;  // [T, D], each a sum over x's width
  const void *x, *weight, *residual;
  const void *bias, *scale;  // [D] or null
  void* result;
  float* moments;  // [moment_parts(D), T, 2]
  Half dtype;
};

std::size_t residual_workspace(const Residual& call, std::size_t tile, const Fc1Place& place);

// Null, or what CUTLASS or CUDA says is wrong.
const char* run_residual(const Residual& call, std::size_t tile, const Fc1Place& place, void* workspace);

}  // namespace fastvit
