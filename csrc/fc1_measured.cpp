#include "fc1_measured.h"

#include <cstdio>

#define FASTVIT_EXPORT extern "C" __attribute__((visibility("default")))

namespace fastvit {
namespace {

constexpr const char* kSchedules[] = {"pingpong", "cooperative", "stream-k"};
constexpr int kKinds = sizeof kEpilogues / sizeof *kEpilogues;

}  // namespace

MeasuredTiles& measured_tiles() {
  static MeasuredTiles tiles;
  return tiles;
}

}  // namespace fastvit

using namespace fastvit;

FASTVIT_EXPORT int fastvit_fc1_tile_name(int tile, char* name, int size) {
  if (tile < 0 || tile >= int(kTileCount)) return 0;
  const Tile& of = kTiles[tile];
  std::snprintf(name, std::size_t(size), "%dx%d %s", of.rows, of.columns, kSchedules[int(of.schedule)]);
  return 1;
}

FASTVIT_EXPORT int fastvit_fc1_measured(const char* gpu, int kind, std::int64_t low, std::int64_t high,
                                        std::int64_t columns, std::int64_t depth, int tile) {
  if (kind < 0 || kind >= kKinds || tile < 0 || tile >= int(kTileCount)) return 0;
  if (!is_compiled(kTiles[tile], Fc1Kind(kind))) return 0;
  measured_tiles().add({gpu, Fc1Kind(kind), {low, columns, depth}, high, std::size_t(tile)});
  return 1;
}

FASTVIT_EXPORT int fastvit_fc1_chosen(const char* gpu, int multiprocessors, int kind, std::int64_t rows,
                                      std::int64_t columns, std::int64_t depth) {
  const auto name = [&] { return gpu; };
  return int(measured_tiles().choose(name, {rows, columns, depth}, multiprocessors, Fc1Kind(kind)));
}

FASTVIT_EXPORT void fastvit_fc1_clear() { measured_tiles().clear(); }
