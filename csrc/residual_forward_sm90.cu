// The product that ends half a block: out = residual + scale (x W^T + bias), with the moments of out's rows beside it.
//
// They are of the rounded numbers, which the next norm reads. Each row of an epilogue's own tile, 32 columns wide, lies
// in four neighbouring lanes, which find its mean and then its spread by two exchanges each: nothing goes through
// shared memory, and no lane waits for another warp.
#include "fc1_gemm_sm90.cuh"
#include "residual_sm90.h"
#include "row_moments.h"

namespace fastvit {
namespace sm90 {
namespace {

// Where the moments go, and a node that only brings it to the device.
struct Told {
  float2* moments;
};

template <typename Fragment>
struct Telling {
  using Arguments = Told;
};

template <typename Element, typename OfColumn>
using Inputs = fusion::Sm90VisitorImpl<fusion::Sm90SrcFetch<Element>, OfColumn, OfColumn,
                                       fusion::Sm90Compute<Telling, float, float, kRounding>>;

// source + scale (a b + bias), and the moments of its rows. The epilogue's own tiles come down the rows first.
template <typename Element, typename OfColumn>
struct AddResidual : Inputs<Element, OfColumn> {
  using Inputs<Element, OfColumn>::Inputs;

  static constexpr int kRows = 2;  // that a thread holds, eight apart

  // Coordinates are of this thread's numbers, from its first: (number, 1, 1, epilogue tile down, and across).
  template <typename Callbacks, typename Coordinates>
  struct Visit : Callbacks {
    static constexpr int kDown = decltype(cute::size<3>(Coordinates{}.layout()))::value;

    CUTLASS_DEVICE Visit(Callbacks&& callbacks, const Coordinates& coordinates, int thread, float2* moments,
                         std::int64_t rows, std::int64_t row, std::int64_t first_column, int columns_left)
        : Callbacks(cute::move(callbacks)),
          coordinates(coordinates),
          moments(moments + first_column / kMomentColumns * rows + row),
          rows(rows),
          rows_left(thread % kLanesApart == 0 ? rows - row : 0),
          columns_left(columns_left) {}

    CUTLASS_DEVICE auto visit(const cutlass::Array<float, kHeld>& product, int v, int m, int n) {
      auto& [source, biases, scales, told] = this->callbacks_tuple;
      cutlass::NumericArrayConverter<float, Element, kHeld> widen;
      cutlass::NumericArrayConverter<Element, float, kHeld, kRounding> narrow;
      const auto residual = widen(source.visit(product, v, m, n));
      const auto bias = biases.visit(product, v, m, n), scale = scales.visit(product, v, m, n);
      cutlass::Array<float, kHeld> sum;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kHeld; ++i) sum[i] = fmaf(product[i] + bias[i], scale[i], residual[i]);
      const auto out = narrow(sum);
      take_moments(widen(out), m, n);
      return out;
    }

    CUTLASS_DEVICE void take_moments(const cutlass::Array<float, kHeld>& x, int m, int n) {
      CUTLASS_PRAGMA_UNROLL
      for (int r = 0; r < kRows; ++r) {
        float own[kHeldColumns];
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kHeld; ++i) {
          if (row(i, m, n) - row(0, m, n) == r * 8) own[place_of_column(column(i, m, n) - column(0, m, n))] = x[i];
        }
        const bool complete = take_tile(held[m][r], own, n, columns_left, [](float number, int distance) {
          return __shfl_xor_sync(~0u, number, distance);
        });
        const int down = row(0, m, n) + r * 8;
        if (complete && down < rows_left) {
          moments[n * kTileColumns / kMomentColumns * rows + down] = {held[m][r].mean, held[m][r].squares};
        }
      }
    }

    CUTLASS_DEVICE int row(int i, int m, int n) const {
      return cute::get<0>(coordinates(cute::_, cute::_, cute::_, m, n)(i));
    }

    CUTLASS_DEVICE int column(int i, int m, int n) const {
      return cute::get<1>(coordinates(cute::_, cute::_, cute::_, m, n)(i));
    }

    Coordinates coordinates;
    float2* moments;  // of this thread's first row in this tile's first columns
    std::int64_t rows, rows_left;
    int columns_left;
    Moments<float> held[kDown][kRows];
  };

  template <bool kReferenceSource, typename... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::detail::ConsumerStoreArgs<Args...>& args) {
    auto callbacks = Inputs<Element, OfColumn>::template get_consumer_store_callbacks<kReferenceSource>(args);
    static_assert(decltype(cute::size<1>(args.epi_tile))::value == kTileColumns);
    static_assert(decltype(cute::size<1>(args.tile_shape_mnk))::value % kMomentColumns == 0);
    const int rows = cute::get<0>(args.problem_shape_mnkl), columns = cute::get<1>(args.problem_shape_mnkl);
    const int columns_left = cute::get<1>(args.residue_cD), rows_left = cute::get<0>(args.residue_tCcD);
    float2* moments = cute::get<3>(callbacks.callbacks_tuple).params.moments;
    return Visit<decltype(callbacks), decltype(args.tCcD)>(cute::move(callbacks), args.tCcD, args.thread_idx, moments,
                                                           rows, rows - rows_left, columns - columns_left,
                                                           columns_left);
  }
};

template <typename Element, std::size_t kRow>
struct WithResidual {
  using Tile = TileOf<kRow>;
  using OfColumn = fusion::Sm90RowBroadcast<0, typename Tile::Shape, Element, float>;
  using Visitor = AddResidual<Element, OfColumn>;
  using Product = Gemm<Tile, Element, ColumnMajor, Element, Visitor>;

  static auto arguments(const Residual& call, const Fc1Place& place) {
    const typename Visitor::Arguments visitor{{},
                                              {static_cast<const Element*>(call.bias), Element(0), {}},
                                              {static_cast<const Element*>(call.scale), Element(1), {}},
                                              {reinterpret_cast<float2*>(call.moments)}};
    return Product::arguments(call.out, call.x, call.weight, call.residual, call.result, visitor, place);
  }
};

}  // namespace
}  // namespace sm90

std::size_t residual_workspace(const Residual& call, std::size_t tile, const Fc1Place& place) {
  return sm90::with_kernel<Fc1Kind::kResidual, std::size_t>(tile, call.dtype, [&](auto element, auto row) {
    using Kernel = sm90::WithResidual<decltype(element), row>;
    return Kernel::Product::Device::get_workspace_size(Kernel::arguments(call, place));
  });
}

const char* run_residual(const Residual& call, std::size_t tile, const Fc1Place& place, void* workspace) {
  return sm90::with_kernel<Fc1Kind::kResidual, const char*>(tile, call.dtype, [&](auto element, auto row) {
    using Kernel = sm90::WithResidual<decltype(element), row>;
    return Kernel::Product::run(Kernel::arguments(call, place), place, workspace);
  });
}

}  // namespace fastvit
