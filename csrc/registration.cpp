// The ops of this library, for the device that it is built for. A CPU's weight may be one that oneDNN packed,
// for which torch has a key of its own.
#include "ops.h"

namespace fastvit {
namespace {

void register_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("layer_norm_linear_fwd", TORCH_BOX(&layer_norm_linear_fwd));
  library.impl("layer_norm_linear_bwd", TORCH_BOX(&layer_norm_linear_bwd));
  library.impl("linear_residual_fwd", TORCH_BOX(&linear_residual_fwd));
  library.impl("linear_residual_bwd", TORCH_BOX(&linear_residual_bwd));
  library.impl("layer_norm_mlp_fwd", TORCH_BOX(&layer_norm_mlp_fwd));
  library.impl("layer_norm_mlp_bwd", TORCH_BOX(&layer_norm_mlp_bwd));
}

}  // namespace

#if defined(FASTVIT_BUILD_CUDA)
// For setup.py, which may find a library that was built elsewhere, and cannot run it.
extern "C" __attribute__((visibility("default"), used)) const char fastvit_built_for[] = FASTVIT_BUILT_FOR;

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CUDA, library) { register_ops(library); }
#else
STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, library) {
  register_ops(library);
  library.impl("attention_fwd", TORCH_BOX(&attention_fwd));
}
STABLE_TORCH_LIBRARY_IMPL(fastvit_native, MkldnnCPU, library) { register_ops(library); }
#endif

}  // namespace fastvit
