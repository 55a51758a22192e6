// Work on a CPU that its threads take share by share. Halves would do for two cores of one speed; where another
// program is on one of them, or on its sibling, the other then takes more.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fastvit {

constexpr std::int64_t kSharesAThread = 8;  // where work is divided by what threads there are

// Calls take(share, thread) once for every share. No two calls at a time are for one thread.
template <typename Take>
void share_out(std::int64_t shares, const Take& take) {
  const std::int64_t threads = std::min<std::int64_t>(torch::stable::get_num_threads(), shares);
  std::atomic<std::int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](std::int64_t thread, std::int64_t end) {
    if (thread == end) return;
    for (std::int64_t share = next++; share < shares; share = next++) take(share, thread);
  });
}

}  // namespace fastvit
