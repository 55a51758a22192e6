// The tiles that were measured to be the fastest for a shape, in the place of what the model of fc1_tiles.h says.
//
// fastvit/fc1_tiles.py reads them from the tables of measurements and hands them over once, by the functions in C.
#pragma once

#include <cstddef>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "fc1_tiles.h"

namespace fastvit {

struct MeasuredTile {
  std::string gpu;  // as CUDA names it
  Fc1Kind kind;
  Extent least;  // its rows are the fewest that it holds for
  std::int64_t most_rows;
  std::size_t tile;
};

class MeasuredTiles {
 public:
  void add(MeasuredTile measured) {
    const std::lock_guard<std::mutex> lock(mutex_);
    measured_.push_back(std::move(measured));
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    measured_.clear();
  }

  // The first that covers the shape, or what the model takes. name() is asked only where something was measured.
  template <typename Name>
  std::size_t choose(const Name& name, const Extent& d, int multiprocessors, Fc1Kind kind) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const MeasuredTile& m : measured_) {
      if (m.kind == kind && m.least.columns == d.columns && m.least.depth == d.depth && m.least.rows <= d.rows &&
          d.rows <= m.most_rows && m.gpu == name()) {
        return m.tile;
      }
    }
    return modelled_tile(d, multiprocessors, kind);
  }

 private:
  mutable std::mutex mutex_;
  std::vector<MeasuredTile> measured_;
};

// Of this library.
MeasuredTiles& measured_tiles();

}  // namespace fastvit

extern "C" {

// Writes the name of a row of kTiles, "128x192 pingpong" say; 0 where there is none.
int fastvit_fc1_tile_name(int tile, char* name, int size);

// Adds a row for `kind`, a number of Fc1Kind, and rows from `low` to `high`; 0 where there is no such kernel.
int fastvit_fc1_measured(const char* gpu, int kind, std::int64_t low, std::int64_t high, std::int64_t columns,
                         std::int64_t depth, int tile);

// The tile that a product takes on a GPU of this name.
int fastvit_fc1_chosen(const char* gpu, int multiprocessors, int kind, std::int64_t rows, std::int64_t columns,
                       std::int64_t depth);

void fastvit_fc1_clear();
}
