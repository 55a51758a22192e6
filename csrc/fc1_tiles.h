// THE table of tiles of fc1's products on Hopper, and which of them a shape takes: what was measured on this GPU, or
// else what a model says.
//
// A row is a kernel that is compiled: forward, with a norm folded in, and backward. The model counts cycles of one
// multiprocessor. No GPU has confirmed it: its numbers are the hardware's rates, and instructions counted in the
// machine code of the tile 128 x 128.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace fastvit {

enum class Schedule {
  kPingpong,     // two warp groups, each on a tile of its own: one multiplies while the other is in its epilogue
  kCooperative,  // two warp groups on halves of one tile: operands are read least often, the epilogue hides nowhere
  kStreamK,      // cooperative, and the sums of what would be a last, partly idle wave are split evenly
};

struct Tile {
  int rows, columns;
  Schedule schedule;
  int cluster;  // blocks side by side along the rows, which share what they read of b
};

constexpr int kTileDepth = 64;  // 128 bytes, as wide as a swizzle

inline constexpr Tile kTiles[] = {
    {64, 128, Schedule::kPingpong, 1},   {128, 128, Schedule::kPingpong, 2},
    {128, 192, Schedule::kPingpong, 2},  {192, 128, Schedule::kPingpong, 2},
    {128, 128, Schedule::kStreamK, 1},   {128, 256, Schedule::kCooperative, 2},
};
inline constexpr std::size_t kTileCount = sizeof kTiles / sizeof *kTiles;

// What is done to each number of a product, in instructions of a warp for 32 of them, and in bytes that pass
// through shared memory, each way, on their way to or from global memory.
struct Epilogue {
  double instructions;
  int bytes;
};

enum class Fc1Kind { kForward, kFolded, kFoldedLinear, kBackward, kResidual };  // kFoldedLinear has no activation

inline constexpr Epilogue kEpilogues[] = {
    {21.5, 8},   // the activation, and what was before it
    {21.0, 4},   // the norm and the activation
    {9.5, 4},    // the norm
    {36.0, 12},  // the slope and the activation, what was before it, the gradient, and sums of columns
    {14.6, 8},   // LayerScale, the residual, and the moments of its rows
};

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

// Whether a thread holds more than 128 numbers of a tile.
constexpr bool is_wide(const Tile& tile) {
  const int threads = tile.schedule == Schedule::kPingpong ? 128 : 256;
  return tile.rows * tile.columns / threads > 128;
}

// Whether there is such a kernel: beside a wide tile only the forward epilogue has registers enough.
constexpr bool is_compiled(const Tile& tile, Fc1Kind kind) { return kind == Fc1Kind::kForward || !is_wide(tile); }

constexpr double larger(double a, double b) { return a > b ? a : b; }

// Cycles that a tile takes: of its products, and of its epilogue beside nothing else.
struct TileCycles {
  double products, epilogue;
  double shared;  // what both ask of shared memory
};

constexpr TileCycles tile_cycles(const Tile& tile, std::int64_t steps, const Epilogue& epilogue) {
  constexpr double kMultiplyAdds = 2048, kSharedBytes = 128;  // a cycle
  constexpr double kWarps = 4;      // of which one issues an instruction each cycle, a scheduler apart
  constexpr double kWaiting = 1.2;  // of one warp a scheduler, which waits for its own results
  constexpr int kHalf = 2, kGroupRows = 64;
  const double numbers = double(tile.rows) * tile.columns;
  // Each product of a warp group reads its 64 rows and all columns; both were written once.
  const double operands = tile.rows + double(tile.columns) * tile.rows / kGroupRows + tile.rows + tile.columns;
  const double multiplying = numbers * kTileDepth / kMultiplyAdds * steps;
  const double reading = operands * kTileDepth * kHalf / kSharedBytes * steps;
  const double passing = numbers * epilogue.bytes / kSharedBytes;
  const double waiting = tile.schedule == Schedule::kPingpong ? kWaiting : 1;
  const double issuing = numbers / (32 * kWarps) * epilogue.instructions * waiting;
  return {larger(multiplying, reading), larger(issuing, passing), reading + passing};
}

// In cycles of one multiprocessor, all of which are waited for.
constexpr double modelled_cost(const Tile& tile, const Extent& d, int multiprocessors, Fc1Kind kind) {
  constexpr std::int64_t kFill = 2;   // steps until the first operands are there
  constexpr std::int64_t kSplit = 4;  // what a tile's partial sums cost in memory, in steps
  const std::int64_t steps = parts(d.depth, kTileDepth);
  const std::int64_t down = parts(parts(d.rows, tile.rows), tile.cluster) * tile.cluster;
  const std::int64_t tiles = down * parts(d.columns, tile.columns);
  const std::int64_t workers = multiprocessors < tile.cluster ? 1 : multiprocessors / tile.cluster * tile.cluster;
  const std::int64_t waves = parts(tiles, workers);
  const TileCycles cycles = tile_cycles(tile, steps, kEpilogues[std::size_t(kind)]);
  const double step = cycles.products / steps, fill = kFill * step;
  switch (tile.schedule) {
    case Schedule::kPingpong: {
      // In turns: a group multiplies while the other does not, and takes its next tile after its own epilogue.
      const double turn = larger(larger(cycles.products, cycles.shared), (cycles.products + cycles.epilogue) / 2);
      return fill + waves * turn + (cycles.products < cycles.epilogue ? cycles.products : cycles.epilogue);
    }
    case Schedule::kStreamK:
      return fill + (parts(tiles * steps, workers) + kSplit) * step + waves * cycles.epilogue;
    default:
      return fill + waves * (cycles.products + cycles.epilogue);
  }
}

// The row of the table that the model takes for a shape: the cheapest, and of equals the first.
constexpr std::size_t modelled_tile(const Extent& d, int multiprocessors, Fc1Kind kind) {
  std::size_t best = 0;
  double least = modelled_cost(kTiles[0], d, multiprocessors, kind);
  for (std::size_t row = 1; row < kTileCount; ++row) {
    if (!is_compiled(kTiles[row], kind)) continue;
    const double cost = modelled_cost(kTiles[row], d, multiprocessors, kind);
    if (cost < least) best = row, least = cost;
  }
  return best;
}

// Rows of partial sums of columns: one for each row of tiles.
constexpr std::int64_t partial_rows(const Tile& tile, const Extent& d) { return parts(d.rows, tile.rows); }

}  // namespace fastvit
