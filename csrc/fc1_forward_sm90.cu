#include "fc1_forward_sm90.cuh"

namespace fastvit {

std::size_t fc1_workspace(const Fc1Forward& call, std::size_t tile, const Fc1Place& place) {
  return is_wide(kTiles[tile]) ? sm90::wide_workspace(call, tile, place)
                               : sm90::forward_workspace<false>(call, tile, place);
}

const char* run_fc1(const Fc1Forward& call, std::size_t tile, const Fc1Place& place, void* workspace) {
  return is_wide(kTiles[tile]) ? sm90::run_wide(call, tile, place, workspace)
                               : sm90::run_forward<false>(call, tile, place, workspace);
}

}  // namespace fastvit
