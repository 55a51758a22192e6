// csrc/fragments.h and fc1_tiles.h behind plain C names, for test_fc1.py.
#include <cstdint>
#include <cstring>

#include "fc1_tiles.h"
#include "fragments.h"

using namespace fastvit;

namespace {

// As many numbers as a thread holds of an epilogue's tile.
struct Fragment {
  static constexpr int kSize = 16;
  float numbers[kSize];

  constexpr std::size_t size() const { return kSize; }
  float& operator[](int i) { return numbers[i]; }
  const float& operator[](int i) const { return numbers[i]; }
};

Fragment load(const float* from) {
  Fragment fragment;
  std::memcpy(&fragment, from, sizeof fragment);
  return fragment;
}

void store(float* to, const Fragment& fragment) { std::memcpy(to, &fragment, sizeof fragment); }

// Calls use(table) with the table of tiles of the forward or the backward pass.
template <typename Use>
auto with_table(int backward, const Use& use) {
  return backward ? use(kBackwardTiles) : use(kForwardTiles);
}

}  // namespace

extern "C" {

void activated(const float* x, float* y, std::int64_t count, int activation) {
  for (std::int64_t i = 0; i < count; i += Fragment::kSize) {
    store(y + i, activated_fragment(load(x + i), Activation(activation)));
  }
}

void differentiated(const float* grad, const float* x, float* dx, float* y, std::int64_t count, int activation) {
  for (std::int64_t i = 0; i < count; i += Fragment::kSize) {
    Fragment again;
    store(dx + i, differentiated_fragment(load(grad + i), load(x + i), Activation(activation), again));
    store(y + i, again);
  }
}

int tiles(int backward) {
  return with_table(backward, [](const auto& table) { return int(sizeof table / sizeof *table); });
}

int tile_rows(int backward, int row) {
  return with_table(backward, [&](const auto& table) { return table[row].rows; });
}

int chosen(int backward, std::int64_t rows, std::int64_t columns, std::int64_t depth, int multiprocessors) {
  return with_table(backward, [&](const auto& table) {
    return int(tile_for(table, {rows, columns, depth}, multiprocessors));
  });
}

double cost(int backward, int row, std::int64_t rows, std::int64_t columns, std::int64_t depth, int multiprocessors) {
  return with_table(backward, [&](const auto& table) {
    return modelled_cost(table[row], {rows, columns, depth}, multiprocessors);
  });
}

std::int64_t rows_of_partials(int row, std::int64_t rows) {
  return partial_rows(kBackwardTiles[row], {rows, 8, 8});
}

int served(std::int64_t rows, std::int64_t columns, std::int64_t depth, const void* a, const void* b) {
  return fits({rows, columns, depth}, {a, b});
}
}
