// A few elements of each row of some weights, by which a copy of them sees that they were written: of weights
// [rows, columns] one element a row, of a vector all. Called through ctypes, beside torch's dispatcher, from
// fastvit/weight_samples.py, which has the same struct.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fastvit {

struct SampledWeight {
  const char* data;
  std::int64_t rows, columns, row_stride, column_stride;  // strides in bytes
  std::int64_t size;                                      // of an element, in bytes: 1, 2, 4 or 8
};

// Columns differ from row to row, a prime apart, so that all are looked at in turn.
constexpr std::int64_t kColumnStep = 10007;

FASTVIT_HOST_DEVICE std::uint64_t bits_at(const SampledWeight& weight, std::int64_t row, std::int64_t column) {
  const char* at = weight.data + row * weight.row_stride + column * weight.column_stride;
  switch (weight.size) {
    case 1:
      return *reinterpret_cast<const std::uint8_t*>(at);
    case 2:
      return *reinterpret_cast<const std::uint16_t*>(at);
    case 4:
      return *reinterpret_cast<const std::uint32_t*>(at);
    default:
      return *reinterpret_cast<const std::uint64_t*>(at);
  }
}

}  // namespace fastvit
