// The gradient of what entered the activation: dbefore = (grad W) activation'(before), W being fc2's weight.
//
// Its epilogue writes the activation once more, which fc2's weight gradient needs, and a row of sums of columns for
// each row of tiles: added up in a step of their own, in a fixed order, they are the gradient of fc1's bias.
#include "fc1_gemm_sm90.cuh"

namespace fastvit {
namespace sm90 {
namespace {

// What the epilogue is told, and a node that only brings it to the device.
struct Told {
  Activation activation;
  float* partials;
};

template <typename Fragment>
struct Telling {
  using Arguments = Told;
};

template <typename Element, typename Store>
using Inputs = fusion::Sm90VisitorImpl<fusion::Sm90SrcFetch<Element>, Store,
                                       fusion::Sm90Compute<Telling, float, float, kRounding>>;

// (a b) activation'(source), with activation(source) into a store, and sums of columns. Rows beyond the matrix are
// zero. The epilogue's own tiles come down the rows first, and the sums of each column of them are written at once.
template <typename Element, typename Store>
struct Differentiate : Inputs<Element, Store> {
  using Inputs<Element, Store>::Inputs;

  // Coordinates are of this thread's numbers, from its first: (number, 1, 1, epilogue tile down, and across).
  template <typename Callbacks, typename Coordinates, int kThreads, int kColumns>
  struct Visit : Callbacks {
    CUTLASS_DEVICE Visit(Callbacks&& callbacks, const Coordinates& coordinates, int thread, float* partials, int left)
        : Callbacks(cute::move(callbacks)),
          coordinates(coordinates),
          thread(thread),
          partials(partials),
          columns_left(left) {}

    CUTLASS_DEVICE void begin_loop(int m, int n) {
      Callbacks::begin_loop(m, n);
      if (m > 0) return;
      CUTLASS_PRAGMA_UNROLL
      for (float& sum : sums) sum = 0.0f;
    }

    CUTLASS_DEVICE auto visit(const cutlass::Array<float, kHeld>& grad, int v, int m, int n) {
      auto& [source, store, told] = this->callbacks_tuple;
      const auto before = source.visit(grad, v, m, n);
      cutlass::NumericArrayConverter<float, Element, kHeld> widen;
      cutlass::Array<float, kHeld> activated;
      const auto dbefore = differentiated_fragment(grad, widen(before), told.params.activation, activated);
      store.visit(grad, v, m, n, activated);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kHeld; ++i) sums[place_of_column(column(i, m, n) - column(0, m, n))] += dbefore[i];
      return dbefore;
    }

    // The buffer is where d goes next, and where the source came from.
    template <typename Buffer, typename Sync, typename Results>
    CUTLASS_DEVICE void reduce(Buffer&& buffer, const Sync& sync, int m, int n, bool last, Results results) {
      Callbacks::reduce(buffer, sync, m, n, last, results);
      if (partials == nullptr || m + 1 < cute::size<3>(coordinates)) return;
      constexpr int kWarps = kThreads / cutlass::NumThreadsPerWarp;
      static_assert(kWarps * kColumns * sizeof(float) <= decltype(cute::size(buffer))::value * sizeof(Element));
      float* shared = reinterpret_cast<float*>(&buffer(cute::_0(), cute::_0()));
      const int warp = thread / cutlass::NumThreadsPerWarp, lane = thread % cutlass::NumThreadsPerWarp;
      const int place = lane / kLanesApart;
      const float sum = sum_over_lanes(sums, place, [](float number, int distance) {
        return __shfl_xor_sync(~0u, number, distance * kLanesApart);
      });
      sync();
      shared[warp * kColumns + lane % kLanesApart * 2 + column_at_place(place)] = sum;
      sync();
      const int at = n * kColumns + thread;
      if (thread < kColumns && at < columns_left) {
        float total = 0.0f;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kWarps; ++i) total += shared[i * kColumns + thread];
        partials[at] = total;
      }
      sync();
    }

    CUTLASS_DEVICE int column(int i, int m, int n) const {
      return cute::get<1>(coordinates(cute::_, cute::_, cute::_, m, n)(i));
    }

    Coordinates coordinates;
    int thread;
    float* partials;  // of this tile, or null
    int columns_left;
    float sums[kHeldColumns];
  };

  template <bool kReferenceSource, typename... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::detail::ConsumerStoreArgs<Args...>& args) {
    auto callbacks = Inputs<Element, Store>::template get_consumer_store_callbacks<kReferenceSource>(args);
    constexpr int kThreads = decltype(cute::size(args.tiled_copy))::value;
    constexpr int kColumns = decltype(cute::size<1>(args.epi_tile))::value;
    const auto [rows_left, columns_left] = args.residue_cD;
    const int columns = cute::get<1>(args.problem_shape_mnkl);
    float* partials = cute::get<2>(callbacks.callbacks_tuple).params.partials;
    // A block may be there to fill its cluster only, with no rows.
    partials = partials == nullptr || rows_left <= 0
                   ? nullptr
                   : partials + std::int64_t(cute::get<0>(args.tile_coord_mnkl) + 1) * columns - columns_left;
    return Visit<decltype(callbacks), decltype(args.tCcD), kThreads, kColumns>(
        cute::move(callbacks), args.tCcD, args.thread_idx, partials, columns_left);
  }
};

template <typename Element, std::size_t kRow>
struct Backward {
  using Tile = TileOf<kRow>;
  using Visitor = Differentiate<Element, typename StoreOf<Tile, Element, Element>::Node>;
  using Product = Gemm<Tile, Element, RowMajor, Element, Visitor>;

  static auto arguments(const Fc1Backward& call, const Fc1Place& place) {
    const auto rows = Product::rows_of(call.out.columns);
    const typename Visitor::Arguments visitor{
        {}, {static_cast<Element*>(call.activated), rows}, {call.activation, call.partials}};
    return Product::arguments(call.out, call.grad, call.weight, call.before, call.dbefore, visitor, place);
  }
};

}  // namespace
}  // namespace sm90

std::size_t fc1_workspace(const Fc1Backward& call, std::size_t tile, const Fc1Place& place) {
  return sm90::with_kernel<Fc1Kind::kBackward, std::size_t>(tile, call.dtype, [&](auto element, auto row) {
    using Kernel = sm90::Backward<decltype(element), row>;
    return Kernel::Product::Device::get_workspace_size(Kernel::arguments(call, place));
  });
}

const char* run_fc1(const Fc1Backward& call, std::size_t tile, const Fc1Place& place, void* workspace) {
  return sm90::with_kernel<Fc1Kind::kBackward, const char*>(tile, call.dtype, [&](auto element, auto row) {
    using Kernel = sm90::Backward<decltype(element), row>;
    return Kernel::Product::run(Kernel::arguments(call, place), place, workspace);
  });
}

}  // namespace fastvit
