// fc1's products on Hopper, with the activation in their epilogue, as the host calls them.
//
//   forward   before = round(x W^T + bias), out = activation(before)
//   folded    out = activation((x W^T - mean sums) rstd + bias), x not yet normalised; QKV's too, without activation
//   backward  dbefore = (grad W) activation'(before), activation(before) once more, and sums of dbefore's rows
//
// Everything is in one dtype of half precision and contiguous; sums are in float32.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <optional>

#include "activation_names.h"
#include "fc1_tiles.h"

namespace fastvit {

enum class Half { kFloat16, kBrainFloat16 };

struct Fc1Forward {
  Extent out;  // [T, D], each a sum over x's width
  const void *x, *weight;
  const void* bias;  // or null
  void *activated, *before;  // before may be null
  Half dtype;
  Activation activation;
};

struct Fc1Folded {
  Extent out;  // [T, D], each a sum over x's width
  const void *x, *weight;
  const float *mean, *rstd;  // [T], of x; mean is null for RMSNorm
  const float *sums, *bias;  // [D]
  void* result;
  Half dtype;
  std::optional<Activation> activation;
};

struct Fc1Backward {
  Extent out;  // [T, D], each a sum over grad's width
  const void *grad, *weight, *before;
  void *dbefore, *activated;
  float* partials;  // [partial_rows, D], or null
  Half dtype;
  Activation activation;
};

// What a kernel runs on: the stream, and how many multiprocessors the device has.
struct Fc1Place {
  int multiprocessors;
  cudaStream_t stream;
  bool begins_early;  // while the kernel before it ends
};

std::size_t fc1_workspace(const Fc1Forward& call, std::size_t tile, const Fc1Place& place);
std::size_t fc1_workspace(const Fc1Folded& call, std::size_t tile, const Fc1Place& place);
std::size_t fc1_workspace(const Fc1Backward& call, std::size_t tile, const Fc1Place& place);

// Null, or what CUTLASS or CUDA says is wrong.
const char* run_fc1(const Fc1Forward& call, std::size_t tile, const Fc1Place& place, void* workspace);
const char* run_fc1(const Fc1Folded& call, std::size_t tile, const Fc1Place& place, void* workspace);
const char* run_fc1(const Fc1Backward& call, std::size_t tile, const Fc1Place& place, void* workspace);

}  // namespace fastvit
