// bfloat16 in memory, float32 in arithmetic, without a branch.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "host_device.h"

namespace fastvit {

struct BrainFloat {
  std::uint16_t bits;
};

template <typename T>
using wide_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

FASTVIT_HOST_DEVICE float widen(float x) { return x; }
FASTVIT_HOST_DEVICE double widen(double x) { return x; }
FASTVIT_HOST_DEVICE float widen(const BrainFloat& x) {
  const std::uint32_t bits = std::uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

FASTVIT_HOST_DEVICE void store(float& to, float x) { to = x; }
FASTVIT_HOST_DEVICE void store(double& to, double x) { to = x; }
// To the nearest, ties to even; a nan stays one.
FASTVIT_HOST_DEVICE void store(BrainFloat& to, float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  to.bits = static_cast<std::uint16_t>((x != x ? 0x7fc00000u : rounded) >> 16);
}

}  // namespace fastvit
