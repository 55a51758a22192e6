// fc1 with the activation in its epilogue: before = round(x W^T + bias), out = activation(before).
//
// The activation is of the rounded numbers, as it is where a pass of its own reads them: what the backward pass
// computes again from them is then the same.
#pragma once

#include "fc1_gemm_sm90.cuh"

namespace fastvit {
namespace sm90 {
namespace {

template <typename Fragment>
struct Activate {
  using Arguments = Activation;

  CUTLASS_DEVICE Fragment operator()(const Fragment& x, Activation activation) const {
    return activated_fragment(x, activation);
  }
};

template <typename Element, std::size_t kRow>
struct Forward {
  using Tile = TileOf<kRow>;
  using Bias = fusion::Sm90RowBroadcast<0, typename Tile::Shape, Element, float>;
  using Sum = fusion::Sm90Compute<cutlass::plus, Element, float, kRounding>;
  using Before = Tree<typename StoreOf<Tile, void, Element>::Node, Tree<Sum, fusion::Sm90AccFetch, Bias>>;
  using Visitor = Tree<fusion::Sm90Compute<Activate, Element, float, kRounding>, Before>;
  using Product = Gemm<Tile, Element, ColumnMajor, void, Visitor>;

  static auto arguments(const Fc1Forward& call, const Fc1Place& place) {
    const typename Visitor::Arguments visitor{
        {{{}, {static_cast<const Element*>(call.bias), Element(0), {}}, {}},
         {static_cast<Element*>(call.before), Product::rows_of(call.out.columns)}},
        call.activation};
    return Product::arguments(call.out, call.x, call.weight, nullptr, call.activated, visitor, place);
  }
};

template <bool kWide>
std::size_t forward_workspace(const Fc1Forward& call, std::size_t tile, const Fc1Place& place) {
  return with_kernel<Fc1Kind::kForward, std::size_t, kWide>(tile, call.dtype, [&](auto element, auto row) {
    using Kernel = Forward<decltype(element), row>;
    return Kernel::Product::Device::get_workspace_size(Kernel::arguments(call, place));
  });
}

template <bool kWide>
const char* run_forward(const Fc1Forward& call, std::size_t tile, const Fc1Place& place, void* workspace) {
  return with_kernel<Fc1Kind::kForward, const char*, kWide>(tile, call.dtype, [&](auto element, auto row) {
    using Kernel = Forward<decltype(element), row>;
    return Kernel::Product::run(Kernel::arguments(call, place), place, workspace);
  });
}

}  // namespace

// Of wide tiles, which are compiled apart.
std::size_t wide_workspace(const Fc1Forward& call, std::size_t tile, const Fc1Place& place);
const char* run_wide(const Fc1Forward& call, std::size_t tile, const Fc1Place& place, void* workspace);

}  // namespace sm90
}  // namespace fastvit
