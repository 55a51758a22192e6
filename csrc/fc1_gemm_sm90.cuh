// A product on Hopper, put together from CUTLASS by a row of fc1_tiles.h and an epilogue.
//
// Its kernels may begin while the one before them ends. The warps that load then wait for its end before their first
// read, in every block. The others read and write only after a product, whose operands were loaded after that wait.
#pragma once

// Before any of CUTLASS's headers: without it the kernels do not wait.
#define CUTLASS_ENABLE_GDC_FOR_SM90

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_compute_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_store_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>

#include <utility>

#include "fc1_sm90.h"
#include "fragments.h"

namespace fastvit::sm90 {

namespace collective = cutlass::epilogue::collective;
namespace fusion = cutlass::epilogue::fusion;

using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;

constexpr auto kRounding = cutlass::FloatRoundStyle::round_to_nearest;
constexpr int kVector = 8;  // halves in the 16 bytes that TMA moves at least

// The types that a row of the table comes down to.
template <std::size_t kRow>
struct TileOf {
  static constexpr Tile kTile = kTiles[kRow];
  static constexpr bool kPingpong = kTile.schedule == Schedule::kPingpong;
  static constexpr bool kStreamK = kTile.schedule == Schedule::kStreamK;
  using Shape = cute::Shape<cute::Int<kTile.rows>, cute::Int<kTile.columns>, cute::Int<kTileDepth>>;
  using Cluster = cute::Shape<cute::Int<kTile.cluster>, cute::_1, cute::_1>;
  using Mainloop = std::conditional_t<kPingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                                      cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
  using Epilogue = std::conditional_t<kPingpong, cutlass::epilogue::TmaWarpSpecialized,
                                      cutlass::epilogue::TmaWarpSpecializedCooperative>;
  using Scheduler =
      std::conditional_t<kStreamK, cutlass::gemm::StreamKScheduler, cutlass::gemm::PersistentScheduler>;
};

constexpr std::size_t stream_k_row() {
  std::size_t row = 0;
  while (kTiles[row].schedule != Schedule::kStreamK) ++row;
  return row;
}
using StreamK = TileOf<stream_k_row()>;

}  // namespace fastvit::sm90

// A kernel asks whether a tile is its block's last, to let the next kernel begin. Stream-K's answer does not compile in
// CUTLASS 4.2: a const function passes a member as a reference that may be written to. "No" is always right: the next
// kernel then begins when the blocks end.
template <>
CUTLASS_DEVICE bool cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90StreamK<
    fastvit::sm90::StreamK::Shape, fastvit::sm90::StreamK::Cluster>::is_last_tile(WorkTileInfo, std::uint32_t) const {
  return false;
}

namespace fastvit::sm90 {

template <typename Node, typename... Children>
using Tree = fusion::Sm90EVT<Node, Children...>;

// A second output [rows, columns] beside d.
template <typename Types, typename Source, typename Element>
struct StoreOf {
  using Epilogue = collective::detail::EpilogueDescriptor<typename Types::Shape, collective::EpilogueTileAuto, Source,
                                                          Element, typename Types::Epilogue>;
  using Aux = collective::detail::AuxStoreDescriptor<Epilogue, RowMajor, Element>;
  using Node = fusion::Sm90AuxStore<Aux::Stages, typename Epilogue::EpilogueTile, Element, kRounding,
                                    typename Aux::Stride, typename Aux::SmemLayoutAtom, typename Aux::CopyOpR2S>;
};

// d = epilogue(a b), a [rows, depth] with rows one after the other and b as its layout says; Source is what the
// epilogue reads beside it, or void.
template <typename Types, typename Element, typename LayoutB, typename Source, typename Visitor>
struct Gemm {
  using Epilogue = typename collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, typename Types::Shape, typename Types::Cluster,
      collective::EpilogueTileAuto, float, float, Source, RowMajor, kVector, Element, RowMajor, kVector,
      typename Types::Epilogue, Visitor>::CollectiveOp;
  using Stages =
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, kVector, Element, LayoutB, kVector, float,
      typename Types::Shape, typename Types::Cluster, Stages, typename Types::Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue,
                                                      typename Types::Scheduler>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using Arguments = typename Device::Arguments;

  // One matrix, so that what a stride says of further ones is not read.
  static auto rows_of(std::int64_t apart) { return cute::make_stride(apart, cute::_1{}, std::int64_t(0)); }

  static Arguments arguments(const Extent& d, const void* a, const void* b, const void* source, void* out,
                             const typename Visitor::Arguments& visitor, const Fc1Place& place) {
    using In = const Element*;
    typename Kernel::StrideB stride_b;
    if constexpr (std::is_same_v<LayoutB, RowMajor>) {
      stride_b = cute::make_stride(cute::_1{}, d.columns, std::int64_t(0));
    } else {
      stride_b = rows_of(d.depth);
    }
    Arguments made{cutlass::gemm::GemmUniversalMode::kGemm,
                   {int(d.rows), int(d.columns), int(d.depth), 1},
                   {static_cast<In>(a), rows_of(d.depth), static_cast<In>(b), stride_b},
                   {visitor, static_cast<In>(source), rows_of(d.columns), static_cast<Element*>(out),
                    rows_of(d.columns)}};
    made.hw_info.sm_count = place.multiprocessors;
    return made;
  }

  static const char* run(const Arguments& arguments, const Fc1Place& place, void* workspace) {
    Device device;
    cutlass::Status status = Device::can_implement(arguments);
    if (status == cutlass::Status::kSuccess) status = device.initialize(arguments, workspace, place.stream);
    // Not stream-K's: before them comes a memset of their workspace, which lets nothing begin, and warps that join
    // partial sums there do not wait.
    const bool early = place.begins_early && !Types::kStreamK;
    if (status == cutlass::Status::kSuccess) status = device.run(place.stream, nullptr, early);
    return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
  }
};

template <Fc1Kind kKind, typename Result, bool kWide, typename Element, std::size_t... kRows, typename Use>
Result with_row(std::size_t row, std::index_sequence<kRows...>, const Use& use) {
  Result result{};
  const auto use_if_it_is = [&](auto candidate) {
    if constexpr (is_compiled(kTiles[candidate()], kKind) && is_wide(kTiles[candidate()]) == kWide) {
      if (row == candidate()) result = use(Element(), candidate);
    }
  };
  (use_if_it_is(std::integral_constant<std::size_t, kRows>()), ...);
  return result;
}

// Calls use(element, row), whose types are those of the dtype and of the row of the table, of wide ones or of others.
// Result is what it returns: to deduce that would compile a kernel for it.
template <Fc1Kind kKind, typename Result, bool kWide = false, typename Use>
Result with_kernel(std::size_t row, Half dtype, const Use& use) {
  using Rows = std::make_index_sequence<kTileCount>;
  return dtype == Half::kFloat16 ? with_row<kKind, Result, kWide, cutlass::half_t>(row, Rows(), use)
                                 : with_row<kKind, Result, kWide, cutlass::bfloat16_t>(row, Rows(), use);
}

}  // namespace fastvit::sm90
