// What the kernels on rows share: vectors of 16 bytes, sums over a warp, types from dtypes, and sums of columns.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>
#include <type_traits>

#include "launch_cuda.h"

namespace fastvit {

constexpr int kLanes = 32;

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16) Vector {
  T at[kWidth];
};

template <int kWidth, typename T>
__device__ __forceinline__ Vector<T, kWidth> load(const T* from) {
  return *reinterpret_cast<const Vector<T, kWidth>*>(from);
}

template <int kWidth, typename T>
__device__ __forceinline__ void store(T* to, const Vector<T, kWidth>& vector) {
  *reinterpret_cast<Vector<T, kWidth>*>(to) = vector;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// A vector of an optional parameter, or one value everywhere.
template <int kWidth, typename T>
__device__ __forceinline__ void load_or(const T* from, std::int64_t column, float otherwise,
                                        float (&values)[kWidth]) {
  if (from == nullptr) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) values[j] = otherwise;
    return;
  }
  const Vector<T, kWidth> vector = load<kWidth>(from + column);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) values[j] = to_float(vector.at[j]);
}

// The same in every lane, to the bit: at each step two lanes add the same two numbers.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int apart = kLanes / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
  return x;
}

// A row and a column from an index. Division of 64 bits takes about a hundred instructions, of 32 twenty.
struct Place {
  std::int64_t row, column;
};

__device__ __forceinline__ Place place_of(std::int64_t index, std::int64_t columns) {
  if (((index | columns) >> 32) == 0) {
    const auto i = static_cast<std::uint32_t>(index), n = static_cast<std::uint32_t>(columns);
    return {i / n, i % n};
  }
  return {index / columns, index % columns};
}

__device__ __forceinline__ std::int64_t thread_index() {
  return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

// Whether vectors of kWidth fit rows of so many columns at these addresses. An absent one is at address zero.
template <int kWidth, typename... T>
bool vectors_fit(std::int64_t columns, const T*... rows) {
  return columns % kWidth == 0 &&
         ((reinterpret_cast<std::uintptr_t>(rows) % alignof(Vector<T, kWidth>) == 0) && ...);
}

// As many numbers as make 16 bytes of the widest type.
template <typename... T>
constexpr int kFullWidth = 16 / std::max({sizeof(T)...});

// The first statement of every kernel here: wait for all that the stream holds before, which is over at once unless
// the launch let this kernel begin early, and let the next begin. No memory may be read or written ahead of it.
__device__ __forceinline__ void await_the_stream() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), std::int64_t blocks, int threads,
            const Tensor& beside, const Arguments&... arguments) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks <= INT_MAX, current_op, ": ", name, ": ", blocks, " blocks are more than a grid holds");
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t how{};
  how.gridDim = dim3(static_cast<unsigned>(blocks));
  how.blockDim = dim3(static_cast<unsigned>(threads));
  how.stream = current_stream(beside);
  how.attrs = &early;
  how.numAttrs = begins_early(beside) ? 1 : 0;
  check(cudaLaunchKernelEx(&how, kernel, Parameters(arguments)...), name);
}

template <typename T>
struct Type {
  using type = T;
};

// Calls use(Type<T>) with the T of a dtype.
template <typename Use>
void with_type(ScalarType dtype, const Use& use) {
  if (dtype == ScalarType::Float) return use(Type<float>{});
  if (dtype == ScalarType::Half) return use(Type<__half>{});
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16, current_op, ": no CUDA kernel for ", name_of(dtype));
  use(Type<__nv_bfloat16>{});
}

// Calls use(Type<A>, Type<B>) for equal types, or float beside a half.
template <typename Use>
void with_types(ScalarType a, ScalarType b, const Use& use) {
  if (a == b) return with_type(a, [&](auto type) { use(type, type); });
  STD_TORCH_CHECK(a == ScalarType::Float, current_op, ": no CUDA kernel for ", name_of(a), " beside ",
                  name_of(b));
  with_type(b, [&](auto type) { use(Type<float>{}, type); });
}

// A parameter beside rows is in their type or in float: any other is converted to float.
inline OptionalTensor parameter(const OptionalTensor& x, ScalarType rows) {
  if (!x) return x;
  return packed(x->scalar_type() == rows ? *x : as_dtype(*x, ScalarType::Float));
}

// Calls use(Type<P>) with the type of such a parameter.
template <typename Rows, typename Use>
void with_parameter(const OptionalTensor& x, const Use& use) {
  if (!x || x->scalar_type() == ScalarType::Float) return use(Type<float>{});
  use(Type<Rows>{});
}

// Kernels that give a warp to a row.
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kLanes;

// How many numbers of a row a lane may hold: what covers the widths of vision transformers.
inline constexpr int kHeldNumbers[] = {8, 16, 24, 32, 48, 64, 96, 128, 160};

constexpr int numbers_before(int numbers) {
  int before = 0;
  for (const int held : kHeldNumbers) before = held < numbers ? held : before;
  return before;
}

// The one before in the list, or none. A row that takes kNumbers is wider than it: so many are there in any lane.
template <int kNumbers>
constexpr int kSureNumbers = numbers_before(kNumbers);

// Calls use(i, column) for each vector of a row that this lane takes: kVectors at most, or, for kVectors = 0,
// however many there are, with i = 0. A vector that every lane has is not asked for.
template <int kVectors, int kWidth, typename Use>
__device__ __forceinline__ void each_vector(std::int64_t columns, const Use& use) {
  const int lane = threadIdx.x % kLanes;
  if constexpr (kVectors > 0) {
    constexpr int kSure = kSureNumbers<kVectors * kWidth> / kWidth;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int column = (i * kLanes + lane) * kWidth;
      if (i < kSure || column < columns) use(i, column);
    }
  } else {
#pragma unroll 4
    for (std::int64_t column = lane * kWidth; column < columns; column += kLanes * kWidth) use(0, column);
  }
}

// A row in registers, or for kVectors = 0 in memory. One that is absent is a number everywhere.
template <typename T, int kVectors, int kWidth>
class Row {
  // As they are loaded: halves would be taken apart at once where two branches meet, and what is on its way waited for.
  struct alignas(kVectors > 0 ? alignof(Vector<T, kWidth>) : alignof(std::uint32_t)) Words {
    std::uint32_t at[kVectors > 0 ? sizeof(Vector<T, kWidth>) / 4 : 1];
  };

 public:
  __device__ __forceinline__ Row(const T* start, std::int64_t columns, float otherwise = 0.0f)
      : start_(start), otherwise_(otherwise) {
    if constexpr (kVectors > 0) {
      if (start != nullptr) {
        each_vector<kVectors, kWidth>(columns, [&](int i, std::int64_t column) {
          held_[i] = *reinterpret_cast<const Words*>(start + column);
        });
        return;
      }
      Vector<T, kWidth> filled;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) filled.at[j] = from_float<T>(otherwise);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) memcpy(&held_[i], &filled, sizeof filled);
    }
  }

  __device__ __forceinline__ void get(int i, std::int64_t column, float (&values)[kWidth]) const {
    if constexpr (kVectors > 0) {
      Vector<T, kWidth> vector;
      memcpy(&vector, &held_[i], sizeof vector);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) values[j] = to_float(vector.at[j]);
    } else {
      load_or<kWidth>(start_, column, otherwise_, values);
    }
  }

 private:
  const T* start_;
  float otherwise_;
  Words held_[kVectors > 0 ? kVectors : 1];
};

template <int kWidth, typename T>
__device__ __forceinline__ void store_floats(T* to, const float (&values)[kWidth]) {
  Vector<T, kWidth> vector;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) vector.at[j] = from_float<T>(values[j]);
  store<kWidth>(to, vector);
}

__device__ __forceinline__ std::int64_t first_row() {
  return static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
}

// Calls use(vectors), an integral_constant, with the vectors that a lane takes of such rows: for the first of
// kHeldNumbers that is enough, up to kMost. False where none is.
template <int kWidth, int kMost, std::size_t kPlace = 0, typename Use>
bool with_vectors(std::int64_t columns, const Use& use) {
  constexpr int kNumbers = kHeldNumbers[kPlace];
  if (columns <= kLanes * kNumbers) return use(std::integral_constant<int, kNumbers / kWidth>{});
  if constexpr (kNumbers < kMost) return with_vectors<kWidth, kMost, kPlace + 1>(columns, use);
  return false;
}

// Sums over the rows of a matrix: first over chunks of rows, then over the chunks, in an order that depends on
// the shape and the device alone. A term says what is summed.
constexpr int kSumWarps = 16;
// Up to so many rows go in one step.
constexpr std::int64_t kSmallSum = 1024;

template <typename T>
struct PlainTerm {
  const T* x;
  std::int64_t columns;

  template <int kWidth>
  __device__ __forceinline__ void add(std::int64_t row, std::int64_t column, float (&sums)[kWidth]) const {
    const Vector<T, kWidth> vector = load<kWidth>(x + row * columns + column);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sums[j] += to_float(vector.at[j]);
  }
};

// A block sums a tile of kLanes * kWidth columns over one chunk of rows, every warp each kSumWarps-th row.
template <int kWidth, typename Term, typename Out>
__global__ void __launch_bounds__(kSumWarps * kLanes)
    column_sums_kernel(Term term, Out* sums, std::int64_t rows, std::int64_t columns, std::int64_t chunk_rows) {
  await_the_stream();
  const int tiles = static_cast<int>((columns + kLanes * kWidth - 1) / (kLanes * kWidth));
  const std::int64_t chunk = static_cast<int>(blockIdx.x) / tiles;
  const int tile = static_cast<int>(blockIdx.x) % tiles;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const std::int64_t column = (static_cast<std::int64_t>(tile) * kLanes + lane) * kWidth;
  const std::int64_t end = min(rows, (chunk + 1) * chunk_rows);

  float own[kWidth] = {};
  if (column < columns) {
#pragma unroll 4
    for (std::int64_t row = chunk * chunk_rows + warp; row < end; row += kSumWarps) {
      term.template add<kWidth>(row, column, own);
    }
  }
  __shared__ float shared[kSumWarps][kWidth][kLanes];
#pragma unroll
  for (int j = 0; j < kWidth; ++j) shared[warp][j][lane] = own[j];
  __syncthreads();
  if (warp != 0 || column >= columns) return;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kSumWarps; ++w) sum += shared[w][j][lane];
    sums[chunk * columns + column + j] = from_float<Out>(sum);
  }
}

// A row of sums for each chunk.
template <int kWidth, typename Out, typename Term>
void sum_chunks(const Term& term, const Tensor& sums, std::int64_t rows, std::int64_t columns,
                std::int64_t chunk_rows) {
  const std::int64_t tiles = ceil_div(columns, kLanes * kWidth);
  launch("column_sums_kernel", column_sums_kernel<kWidth, Term, Out>, tiles * ceil_div(rows, chunk_rows),
         kSumWarps * kLanes, sums, term, output_of<Out>(sums), rows, columns, chunk_rows);
}

// All rows in one step, into a tensor of [columns].
template <typename Term>
void sum_at_once(const Term& term, const Tensor& sums, std::int64_t rows, std::int64_t columns) {
  with_type(sums.scalar_type(), [&](auto type) {
    sum_chunks<1, typename decltype(type)::type>(term, sums, rows, columns, rows);
  });
}

// [columns] in dtype: the sums of partial sums, which are few.
inline Tensor sum_partials(const Tensor& partials, ScalarType dtype) {
  const Tensor sums = empty_beside(partials, {partials.size(1)}, dtype);
  sum_at_once(PlainTerm<float>{data_of<float>(partials), partials.size(1)}, sums, partials.size(0),
              partials.size(1));
  return sums;
}

// [columns] in dtype: the sum of a term over all rows.
template <int kWidth, typename Term>
Tensor sum_columns(const Term& term, const Tensor& beside, std::int64_t rows, std::int64_t columns,
                   ScalarType dtype) {
  if (rows <= kSmallSum || columns == 0) {
    Tensor sums = empty_beside(beside, {columns}, dtype);
    if (rows == 0) return torch::stable::zero_(sums);
    sum_at_once(term, sums, rows, columns);
    return sums;
  }
  const std::int64_t wanted = 2 * multiprocessors(beside) / ceil_div(columns, kLanes * kWidth);
  const std::int64_t most = rows / (4 * kSumWarps);
  const std::int64_t chunk_rows = ceil_div(rows, std::max<std::int64_t>(std::min(wanted, most), 1));
  const Tensor partials = empty_beside(beside, {ceil_div(rows, chunk_rows), columns}, ScalarType::Float);
  sum_chunks<kWidth, float>(term, partials, rows, columns, chunk_rows);
  return sum_partials(partials, dtype);
}

}  // namespace fastvit
