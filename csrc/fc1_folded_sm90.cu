// A product whose norm is folded into its weight: out = activation((x W'^T - mean sums) rstd + bias), x as it is.
//
// Nothing is kept for a backward pass, so that the activation is of numbers that were not rounded before: a quarter
// of the error less, and fewer instructions.
#include "fc1_gemm_sm90.cuh"

namespace fastvit {
namespace sm90 {
namespace {

struct Told {
  Activation activation;
  bool activates;
};

template <typename Fragment>
struct Finish {
  using Arguments = Told;

  CUTLASS_DEVICE Fragment operator()(const Fragment& product, const Fragment& mean, const Fragment& rstd,
                                     const Fragment& sums, const Fragment& bias, Told told) const {
    const Fragment y = normalized_fragment(product, mean, rstd, sums, bias);
    return told.activates ? activated_fragment(y, told.activation) : y;
  }
};

template <typename Element, std::size_t kRow>
struct Folded {
  using Tile = TileOf<kRow>;
  using OfRow = fusion::Sm90ColBroadcast<0, typename Tile::Shape, float>;
  using OfColumn = fusion::Sm90RowBroadcast<0, typename Tile::Shape, float>;
  using Visitor = Tree<fusion::Sm90Compute<Finish, Element, float, kRounding>, fusion::Sm90AccFetch, OfRow, OfRow,
                       OfColumn, OfColumn>;
  using Product = Gemm<Tile, Element, ColumnMajor, void, Visitor>;

  static auto arguments(const Fc1Folded& call, const Fc1Place& place) {
    const typename Visitor::Arguments visitor{
        {}, {call.mean}, {call.rstd}, {call.sums}, {call.bias},
        {call.activation.value_or(Activation::kRelu), call.activation.has_value()}};
    return Product::arguments(call.out, call.x, call.weight, nullptr, call.result, visitor, place);
  }
};

}  // namespace
}  // namespace sm90

std::size_t fc1_workspace(const Fc1Folded& call, std::size_t tile, const Fc1Place& place) {
  return sm90::with_kernel<Fc1Kind::kFolded, std::size_t>(tile, call.dtype, [&](auto element, auto row) {
    using Kernel = sm90::Folded<decltype(element), row>;
    return Kernel::Product::Device::get_workspace_size(Kernel::arguments(call, place));
  });
}

const char* run_fc1(const Fc1Folded& call, std::size_t tile, const Fc1Place& place, void* workspace) {
  return sm90::with_kernel<Fc1Kind::kFolded, const char*>(tile, call.dtype, [&](auto element, auto row) {
    using Kernel = sm90::Folded<decltype(element), row>;
    return Kernel::Product::run(Kernel::arguments(call, place), place, workspace);
  });
}

}  // namespace fastvit
