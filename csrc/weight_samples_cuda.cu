// See weight_samples.h. Nothing here waits for the GPU: whether a sample differs is written to memory of the host,
// where it is read before the next call.
#include <cuda_runtime.h>

#include "weight_samples.h"

namespace fastvit {
namespace {

constexpr int kMostWeights = 8, kThreads = 256;

struct Weights {
  SampledWeight of[kMostWeights];
  int count;
};

// Of the sample's element at this place.
__device__ __forceinline__ std::uint64_t bits_now(const Weights& weights, std::int64_t place) {
  for (int i = 0; i < weights.count; ++i) {
    const SampledWeight& weight = weights.of[i];
    if (place < weight.rows) return bits_at(weight, place, place * kColumnStep % weight.columns);
    place -= weight.rows;
  }
  return 0;
}

__global__ void __launch_bounds__(kThreads) take_kernel(Weights weights, std::int64_t places, std::uint64_t* sample) {
  const std::int64_t place = blockIdx.x * static_cast<std::int64_t>(kThreads) + threadIdx.x;
  if (place < places) sample[place] = bits_now(weights, place);
}

__global__ void __launch_bounds__(kThreads) compare_kernel(Weights weights, std::int64_t places,
                                                           const std::uint64_t* sample, volatile int* differs) {
  const std::int64_t place = blockIdx.x * static_cast<std::int64_t>(kThreads) + threadIdx.x;
  if (place < places && sample[place] != bits_now(weights, place)) *differs = 1;
}

}  // namespace
}  // namespace fastvit

// On the current device and this stream; takes the sample if `differs` is null. Returns CUDA's status.
extern "C" __attribute__((visibility("default"))) int fastvit_sample_on_device(const fastvit::SampledWeight* weights,
                                                                               std::int64_t count,
                                                                               std::uint64_t* sample, int* differs,
                                                                               void* stream) {
  using namespace fastvit;
  if (count > kMostWeights) return cudaErrorInvalidValue;
  Weights given{};
  given.count = static_cast<int>(count);
  std::int64_t places = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    given.of[i] = weights[i];
    places += weights[i].rows;
  }
  if (places == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>((places + kThreads - 1) / kThreads);
  const auto on = static_cast<cudaStream_t>(stream);
  if (differs == nullptr) {
    take_kernel<<<blocks, kThreads, 0, on>>>(given, places, sample);
  } else {
    compare_kernel<<<blocks, kThreads, 0, on>>>(given, places, sample, differs);
  }
  return cudaGetLastError();
}
