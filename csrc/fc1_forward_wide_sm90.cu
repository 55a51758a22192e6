// fc1 forward with wide tiles, whose threads hold 192 numbers each.
#include <cutlass/arch/reg_reconfig.h>

// CUTLASS leaves 40 registers a thread to the warp group that loads and gives 232 to those that multiply, and wide
// tiles then spill six. These are its own shares for tiles from 128 x 208 on. Stream-K's kernels, and those that load
// a source, would spill in the group that loads: hence a file of its own.
template <>
CUTLASS_DEVICE void cutlass::arch::warpgroup_reg_alloc<232>() {
  warpgroup_reg_alloc<240>();
}

template <>
CUTLASS_DEVICE void cutlass::arch::warpgroup_reg_dealloc<40>() {
  warpgroup_reg_dealloc<24>();
}

#include "fc1_forward_sm90.cuh"

namespace fastvit::sm90 {

std::size_t wide_workspace(const Fc1Forward& call, std::size_t tile, const Fc1Place& place) {
  return forward_workspace<true>(call, tile, place);
}

const char* run_wide(const Fc1Forward& call, std::size_t tile, const Fc1Place& place, void* workspace) {
  return run_forward<true>(call, tile, place, workspace);
}

}  // namespace fastvit::sm90
