// See weight_samples.h.
#include "weight_samples.h"

namespace {

using fastvit::SampledWeight;

// Rows are a page or more apart: their loads wait for memory together, as long as no branch is between them.
template <typename Take>
void each_sampled(const SampledWeight* weights, std::int64_t count, const Take& take) {
  for (const SampledWeight* weight = weights; weight != weights + count; ++weight) {
    const std::int64_t step = fastvit::kColumnStep % weight->columns;
    for (std::int64_t row = 0, column = 0; row < weight->rows; ++row) {
      take(fastvit::bits_at(*weight, row, column));
      column += step;
      column -= column < weight->columns ? 0 : weight->columns;
    }
  }
}

}  // namespace

#define FASTVIT_EXPORT extern "C" __attribute__((visibility("default")))

FASTVIT_EXPORT void fastvit_take_sample(const SampledWeight* weights, std::int64_t count, std::uint64_t* sample) {
  each_sampled(weights, count, [&](std::uint64_t bits) { *sample++ = bits; });
}

// Whether an element of the sample is another now.
FASTVIT_EXPORT int fastvit_sample_differs(const SampledWeight* weights, std::int64_t count,
                                          const std::uint64_t* sample) {
  std::uint64_t differs = 0;
  each_sampled(weights, count, [&](std::uint64_t bits) { differs |= *sample++ ^ bits; });
  return differs != 0;
}
