// csrc/row_moments.h behind plain C names, for test_row_moments.py.
#include "row_moments.h"

#include <pthread.h>

#include <cstdint>
#include <thread>
#include <vector>

using namespace fastvit;

namespace {

constexpr int kLanes = kLanesApart;  // of a row

template <typename T>
void take(const T* x, T* moments, std::int64_t rows, std::int64_t columns) {
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t part = 0; part < moment_parts(columns); ++part) {
      const std::int64_t first = part * kMomentColumns, left = columns - first;
      const T* numbers = x + row * columns + first;
      const Moments<T> of = moments_of<T>(left < kMomentColumns ? left : kMomentColumns,
                                          [&](std::int64_t i) { return numbers[i]; });
      moments[(part * rows + row) * 2] = of.mean;
      moments[(part * rows + row) * 2 + 1] = of.squares;
    }
  }
}

template <typename T>
void statistics(const T* moments, T* mean, T* rstd, std::int64_t rows, std::int64_t columns, T eps, int rms) {
  for (std::int64_t row = 0; row < rows; ++row) {
    const auto load = [&](std::int64_t part, T& of_mean, T& squares) {
      of_mean = moments[(part * rows + row) * 2];
      squares = moments[(part * rows + row) * 2 + 1];
    };
    const RowStatistics<T> of = statistics_from(joined_moments<T>(columns, load), eps, rms != 0);
    mean[row] = of.mean();
    rstd[row] = of.rstd;
  }
}

}  // namespace

extern "C" {

// As the epilogue of a product takes them, in tiles of `tile` columns: four lanes side by side hold a row.
void epilogue_moments(const float* x, float* moments, std::int64_t rows, std::int64_t columns, std::int64_t tile) {
  float shared[kLanes];
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, nullptr, kLanes);
  std::vector<std::thread> lanes;
  for (int lane = 0; lane < kLanes; ++lane) {
    lanes.emplace_back([&, lane] {
      const auto exchange = [&](float number, int distance) {
        shared[lane] = number;
        pthread_barrier_wait(&barrier);
        const float other = shared[lane ^ distance];
        pthread_barrier_wait(&barrier);
        return other;
      };
      for (std::int64_t row = 0; row < rows; ++row) {
        for (std::int64_t first = 0; first < columns; first += tile) {
          Moments<float> held{};
          for (int n = 0; n * kTileColumns < tile; ++n) {
            float own[kHeldColumns];
            for (int place = 0; place < kHeldColumns; ++place) {
              const std::int64_t column = first + n * kTileColumns + column_at_place(place) + 2 * lane;
              own[place] = column < columns ? x[row * columns + column] : 1e30f;  // what no one may read
            }
            if (!take_tile(held, own, n, int(columns - first), exchange) || lane != 0) continue;
            float* to = moments + ((first + n * kTileColumns) / kMomentColumns * rows + row) * 2;
            to[0] = held.mean;
            to[1] = held.squares;
          }
        }
      }
    });
  }
  for (std::thread& lane : lanes) lane.join();
  pthread_barrier_destroy(&barrier);
}

void moments_float(const float* x, float* m, std::int64_t rows, std::int64_t columns) { take(x, m, rows, columns); }
void moments_double(const double* x, double* m, std::int64_t rows, std::int64_t columns) { take(x, m, rows, columns); }

void statistics_float(const float* m, float* mean, float* rstd, std::int64_t rows, std::int64_t columns, float eps,
                      int rms) {
  statistics(m, mean, rstd, rows, columns, eps, rms);
}
void statistics_double(const double* m, double* mean, double* rstd, std::int64_t rows, std::int64_t columns,
                       double eps, int rms) {
  statistics(m, mean, rstd, rows, columns, eps, rms);
}
}
