// THE table of tiles of fc1's products on Hopper, and which of them a shape takes. Nothing is tuned at run time.
//
// A row is a kernel that is compiled: forward, with a norm folded in, and backward. No time was measured yet: a
// row's speed is modelled, and so is what a wave and a split of the sum cost.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace fastvit {

enum class Schedule {
  kPingpong,     // two warp groups, each on a tile of its own: one multiplies while the other is in its epilogue
  kCooperative,  // two warp groups on halves of one tile: the widest, so that operands are read least often
  kStreamK,      // cooperative, and the sums of what would be a last, partly idle wave are split evenly
};

struct Tile {
  int rows, columns;
  Schedule schedule;
  int cluster;   // blocks side by side along the rows, which share what they read of b
  double speed;  // of its multiplications in steady state, against the fastest
};

constexpr int kTileDepth = 64;  // 128 bytes, as wide as a swizzle

inline constexpr Tile kTiles[] = {
    {64, 128, Schedule::kPingpong, 1, 0.75},
    {128, 128, Schedule::kPingpong, 2, 0.95},
    {128, 128, Schedule::kStreamK, 1, 0.90},
    {128, 256, Schedule::kCooperative, 2, 1.00},
};
inline constexpr std::size_t kTileCount = sizeof kTiles / sizeof *kTiles;

// Of d [rows, columns], and how many products each of its numbers is the sum of.
struct Extent {
  std::int64_t rows, columns, depth;
};

// What TMA and CUTLASS can address: rows of whole vectors of 16 bytes, and sizes that an int holds with room for a
// cluster of tiles.
inline bool fits(const Extent& d, std::initializer_list<const void*> addresses) {
  constexpr std::int64_t kVector = 8, kMost = INT_MAX - 1024;
  for (const std::int64_t size : {d.rows, d.columns, d.depth}) {
    if (size <= 0 || size > kMost) return false;
  }
  for (const void* address : addresses) {
    if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0) return false;
  }
  return d.columns % kVector == 0 && d.depth % kVector == 0;
}

constexpr std::int64_t parts(std::int64_t whole, std::int64_t part) { return (whole + part - 1) / part; }

// In multiply-adds of one multiprocessor, all of which are waited for.
constexpr double modelled_cost(const Tile& tile, const Extent& d, int multiprocessors) {
  constexpr std::int64_t kFill = 2;   // steps until the first operands are there
  constexpr std::int64_t kSplit = 4;  // what a tile's partial sums cost in memory, in steps
  const std::int64_t steps = parts(d.depth, kTileDepth);
  const std::int64_t down = parts(parts(d.rows, tile.rows), tile.cluster) * tile.cluster;
  const std::int64_t tiles = down * parts(d.columns, tile.columns);
  const std::int64_t workers = multiprocessors < tile.cluster ? 1 : multiprocessors / tile.cluster * tile.cluster;
  const std::int64_t steps_of_one = tile.schedule == Schedule::kStreamK ? parts(tiles * steps, workers) + kSplit
                                                                        : parts(tiles, workers) * steps;
  return double(steps_of_one + kFill) * tile.rows * tile.columns * kTileDepth / tile.speed;
}

// The row of the table that a shape takes: the cheapest, and of equals the first.
constexpr std::size_t tile_for(const Extent& d, int multiprocessors) {
  std::size_t best = 0;
  for (std::size_t row = 1; row < kTileCount; ++row) {
    if (modelled_cost(kTiles[row], d, multiprocessors) < modelled_cost(kTiles[best], d, multiprocessors)) best = row;
  }
  return best;
}

// Rows of partial sums of columns: one for each row of tiles.
constexpr std::int64_t partial_rows(const Tile& tile, const Extent& d) { return parts(d.rows, tile.rows); }

}  // namespace fastvit
