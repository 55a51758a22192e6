// csrc/fragments.h and fc1_tiles.h behind plain C names, for test_fc1.py and test_folding.py. The tests link
// fc1_measured.cpp too, as it is in the CUDA library.
#include <pthread.h>

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "fc1_tiles.h"
#include "fragments.h"
#include "row_norm.h"

using namespace fastvit;

namespace {

// As many numbers as a thread holds of an epilogue's tile.
struct Fragment {
  static constexpr int kSize = kHeld;
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

Fragment everywhere(float number) {
  Fragment fragment;
  for (int i = 0; i < kHeld; ++i) fragment[i] = number;
  return fragment;
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

// Each row's mean and rstd as the norm's kernel has them: a mean, then what is left of it.
void statistics(const float* x, float* mean, float* rstd, std::int64_t rows, std::int64_t columns, float eps, int rms) {
  for (std::int64_t row = 0; row < rows; ++row, x += columns) {
    float sum = 0.0f, left = 0.0f, squares = 0.0f;
    for (std::int64_t i = 0; i < columns; ++i) sum += x[i];
    const float about = rms ? 0.0f : sum / float(columns);
    for (std::int64_t i = 0; i < columns; ++i) {
      left += x[i] - about;
      squares += (x[i] - about) * (x[i] - about);
    }
    const RowStatistics<float> of = row_statistics(about, left, squares, RowWidth<float>(columns), eps, rms != 0);
    mean[row] = of.mean();
    rstd[row] = of.rstd;
  }
}

// What a folded norm leaves to do to a product [rows, columns].
void normalized(const float* product, const float* mean, const float* rstd, const float* sums, const float* bias,
                float* y, std::int64_t rows, std::int64_t columns) {
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t i = 0; i < columns; i += kHeld) {
      const std::int64_t at = row * columns + i;
      store(y + at, normalized_fragment(load(product + at), everywhere(mean[row]), everywhere(rstd[row]),
                                        load(sums + i), load(bias + i)));
    }
  }
}

// The sums of eight columns by eight lanes that run side by side, of which each has eight numbers.
void sums_over_lanes(const float* numbers, float* sums) {
  constexpr int kLanes = kHeldColumns;
  float shared[kLanes];
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, nullptr, kLanes);
  std::vector<std::thread> lanes;
  for (int place = 0; place < kLanes; ++place) {
    lanes.emplace_back([&, place] {
      float own[kHeldColumns];
      std::memcpy(own, numbers + place * kHeldColumns, sizeof own);
      sums[place] = sum_over_lanes(own, place, [&](float number, int distance) {
        shared[place] = number;
        pthread_barrier_wait(&barrier);
        const float other = shared[place ^ distance];
        pthread_barrier_wait(&barrier);
        return other;
      });
    });
  }
  for (std::thread& lane : lanes) lane.join();
  pthread_barrier_destroy(&barrier);
}

int column(int place) { return column_at_place(place); }
int place(int column) { return place_of_column(column); }

int tiles() { return int(kTileCount); }

int tile_rows(int row) { return kTiles[row].rows; }

int kinds() { return int(sizeof kEpilogues / sizeof *kEpilogues); }

int tile_columns(int row) { return kTiles[row].columns; }

int compiled(int row, int kind) { return is_compiled(kTiles[row], Fc1Kind(kind)); }

int is_pingpong(int row) { return kTiles[row].schedule == Schedule::kPingpong; }

int modelled(std::int64_t rows, std::int64_t columns, std::int64_t depth, int multiprocessors, int kind) {
  return int(modelled_tile({rows, columns, depth}, multiprocessors, Fc1Kind(kind)));
}

double cost(int row, std::int64_t rows, std::int64_t columns, std::int64_t depth, int multiprocessors, int kind) {
  return modelled_cost(kTiles[row], {rows, columns, depth}, multiprocessors, Fc1Kind(kind));
}

std::int64_t rows_of_partials(int row, std::int64_t rows) { return partial_rows(kTiles[row], {rows, 8, 8}); }

int served(std::int64_t rows, std::int64_t columns, std::int64_t depth, const void* a, const void* b) {
  return fits({rows, columns, depth}, {a, b});
}
}
