// Which products have the activation in their epilogue, or the residual, or a norm folded into them, and the memory for
// them. The kernels are fc1_*_sm90.cu and residual_forward_sm90.cu.
#include "fused_products.h"

#if defined(FASTVIT_CUTLASS)

#include <map>
#include <mutex>
#include <string>

#include "fc1_measured.h"
#include "fc1_sm90.h"
#include "launch_cuda.h"
#include "residual_sm90.h"
#include "row_moments.h"

namespace fastvit {
namespace {

// Warp groups multiply on sm_90 alone.
bool is_hopper(const Tensor& x) {
  return device_attribute(x, cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(x, cudaDevAttrComputeCapabilityMinor) == 0;
}

std::optional<Half> half_of(ScalarType dtype) {
  if (dtype == ScalarType::Half) return Half::kFloat16;
  if (dtype == ScalarType::BFloat16) return Half::kBrainFloat16;
  return std::nullopt;
}

// Asked of CUDA once a device: it takes a millisecond.
const std::string& device_name(int device) {
  static std::mutex mutex;
  static std::map<int, std::string> names;
  const std::lock_guard<std::mutex> lock(mutex);
  std::string& name = names[device];
  if (name.empty()) {
    cudaDeviceProp facts;
    check(cudaGetDeviceProperties(&facts, device), "cudaGetDeviceProperties");
    name = facts.name;
  }
  return name;
}

std::size_t tile_for(const Extent& out, const Tensor& beside, Fc1Kind kind) {
  const auto name = [&]() -> const std::string& { return device_name(beside.get_device_index()); };
  return measured_tiles().choose(name, out, static_cast<int>(multiprocessors(beside)), kind);
}

template <typename Workspace, typename Run>
void run_with(const Tensor& beside, const char* what, const Workspace& workspace_of, const Run& run_on) {
  const Fc1Place place{static_cast<int>(multiprocessors(beside)), current_stream(beside), begins_early(beside)};
  const RelaxedCapture relaxed;
  const Tensor workspace = empty_beside(beside, {static_cast<std::int64_t>(workspace_of(place))}, ScalarType::Byte);
  const char* wrong = run_on(place, workspace.data_ptr());
  STD_TORCH_CHECK(wrong == nullptr, current_op, ": the product with the ", what, ": ", wrong);
}

template <typename Call>
void run(const Call& call, std::size_t tile, const Tensor& beside) {
  run_with(
      beside, "activation", [&](const Fc1Place& place) { return fc1_workspace(call, tile, place); },
      [&](const Fc1Place& place, void* workspace) { return run_fc1(call, tile, place, workspace); });
}

const void* address(const OptionalTensor& x) { return x ? x->data_ptr() : nullptr; }

}  // namespace

std::optional<Activated> fused_activated(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                         Activation activation, bool keep_before) {
  const ScalarType dtype = x.scalar_type();
  const std::optional<Half> half = half_of(dtype);
  if (!half || weight.scalar_type() != dtype || !is_hopper(x)) return std::nullopt;
  const Tensor rows = packed(x), matrix = packed(weight);
  const OptionalTensor vector = bias ? OptionalTensor(packed(as_dtype(*bias, dtype))) : bias;
  const Extent out{rows.size(0), matrix.size(0), rows.size(1)};
  if (!fits(out, {rows.data_ptr(), matrix.data_ptr()})) return std::nullopt;
  const Tensor activated = empty_beside(x, {out.rows, out.columns}, dtype);
  const OptionalTensor before =
      keep_before ? OptionalTensor(empty_beside(x, {out.rows, out.columns}, dtype)) : std::nullopt;
  const Fc1Forward call{out,   rows.data_ptr(), matrix.data_ptr(), address(vector), activated.data_ptr(),
                        before ? before->data_ptr() : nullptr,     *half,           activation};
  run(call, tile_for(out, x, Fc1Kind::kForward), x);
  return Activated{activated, before};
}

// x [T, K] is read twice, by its statistics (8 bytes a row) and by the product, or once where its moments are there. A
// norm of its own reads it once and writes as much, which the product reads: spared are 2 T K bytes, and as much memory.
// float16 overflows nowhere, as
// rows are no larger than they are and sums are in float32.
OptionalTensor folded_linear(const Tensor& x, const Norm& norm, const std::vector<Tensor>& folded,
                             std::optional<Activation> activation, const OptionalTensor& moments) {
  if (folded.empty()) return std::nullopt;
  STD_TORCH_CHECK(folded.size() == 3, current_op, ": a folded norm is a weight, sums and a bias");
  const Tensor rows = packed(x), matrix = packed(folded[0]), sums = packed(folded[1]), bias = packed(folded[2]);
  const Extent out{rows.size(0), matrix.size(0), rows.size(1)};
  for (const Tensor& vector : {sums, bias}) {
    STD_TORCH_CHECK(vector.scalar_type() == ScalarType::Float && vector.numel() == out.columns, current_op,
                    ": a folded norm's sums and bias are float32, one for each output");
  }
  const ScalarType dtype = x.scalar_type();
  const std::optional<Half> half = half_of(dtype);
  if (!half || matrix.scalar_type() != dtype || !is_hopper(x)) return std::nullopt;
  if (!fits(out, {rows.data_ptr(), matrix.data_ptr()})) return std::nullopt;
  const Statistics of = moments ? statistics_of_moments(*moments, rows, norm) : norm_statistics(rows, norm);
  const Tensor result = empty_beside(x, {out.rows, out.columns}, dtype);
  const Fc1Folded call{out,
                       rows.data_ptr(),
                       matrix.data_ptr(),
                       norm.rms ? nullptr : data_of<float>(of.mean),
                       data_of<float>(of.rstd),
                       data_of<float>(sums),
                       data_of<float>(bias),
                       result.data_ptr(),
                       *half,
                       activation};
  run(call, tile_for(out, x, activation ? Fc1Kind::kFolded : Fc1Kind::kFoldedLinear), x);
  return result;
}

std::optional<WithMoments> fused_residual(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                          const OptionalTensor& layer_scale, const Tensor& residual) {
  const ScalarType dtype = x.scalar_type();
  const std::optional<Half> half = half_of(dtype);
  if (!half || weight.scalar_type() != dtype || residual.scalar_type() != dtype || !is_hopper(x)) return std::nullopt;
  const Tensor rows = packed(x), matrix = packed(weight), around = packed(residual);
  const auto ready = [&](const OptionalTensor& t) { return t ? OptionalTensor(packed(as_dtype(*t, dtype))) : t; };
  const OptionalTensor vector = ready(bias), scale = ready(layer_scale);
  const Extent out{rows.size(0), matrix.size(0), rows.size(1)};
  if (!fits(out, {rows.data_ptr(), matrix.data_ptr(), around.data_ptr()})) return std::nullopt;
  const Tensor result = empty_like_as(around, dtype);
  const Tensor moments = empty_beside(x, {moment_parts(out.columns), out.rows, 2}, ScalarType::Float);
  const Residual call{out,
                      rows.data_ptr(),
                      matrix.data_ptr(),
                      around.data_ptr(),
                      address(vector),
                      address(scale),
                      result.data_ptr(),
                      output_of<float>(moments),
                      *half};
  const std::size_t tile = tile_for(out, x, Fc1Kind::kResidual);
  run_with(
      x, "residual", [&](const Fc1Place& place) { return residual_workspace(call, tile, place); },
      [&](const Fc1Place& place, void* workspace) { return run_residual(call, tile, place, workspace); });
  return WithMoments{result, moments};
}

std::optional<ActivatedGradients> fused_activated_backward(const Tensor& grad, const Tensor& weight,
                                                           const Tensor& before, Activation activation,
                                                           bool needs_bias) {
  const ScalarType dtype = grad.scalar_type();
  const std::optional<Half> half = half_of(dtype);
  if (!half || weight.scalar_type() != dtype || before.scalar_type() != dtype || !is_hopper(grad)) {
    return std::nullopt;
  }
  const Tensor rows = packed(grad), matrix = packed(weight), entered = packed(before);
  const Extent out{rows.size(0), matrix.size(1), rows.size(1)};
  if (!fits(out, {rows.data_ptr(), matrix.data_ptr(), entered.data_ptr()})) return std::nullopt;
  const std::size_t tile = tile_for(out, grad, Fc1Kind::kBackward);
  const Tensor dbefore = empty_like_as(entered, dtype), activated = empty_like_as(entered, dtype);
  OptionalTensor partials;
  if (needs_bias) {
    partials = empty_beside(grad, {partial_rows(kTiles[tile], out), out.columns}, ScalarType::Float);
  }
  const Fc1Backward call{out,
                         rows.data_ptr(),
                         matrix.data_ptr(),
                         entered.data_ptr(),
                         dbefore.data_ptr(),
                         activated.data_ptr(),
                         partials ? output_of<float>(*partials) : nullptr,
                         *half,
                         activation};
  run(call, tile, grad);
  OptionalTensor bias;
  if (partials) bias = as_dtype(sum_rows(*partials), dtype);
  return ActivatedGradients{dbefore, activated, bias};
}

}  // namespace fastvit

#else

namespace fastvit {

std::optional<Activated> fused_activated(const Tensor&, const Tensor&, const OptionalTensor&, Activation, bool) {
  return std::nullopt;
}

OptionalTensor folded_linear(const Tensor&, const Norm&, const std::vector<Tensor>&, std::optional<Activation>,
                             const OptionalTensor&) {
  return std::nullopt;
}

std::optional<WithMoments> fused_residual(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                          const Tensor&) {
  return std::nullopt;
}

std::optional<ActivatedGradients> fused_activated_backward(const Tensor&, const Tensor&, const Tensor&, Activation,
                                                           bool) {
  return std::nullopt;
}

}  // namespace fastvit

#endif
