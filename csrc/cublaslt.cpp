// A handle for each device, and the algorithm chosen once for each kind of product.
#include "cublaslt.h"

#include <algorithm>
#include <array>
#include <mutex>
#include <unordered_map>

#include "launch_cuda.h"

namespace fastvit {
namespace {

void check(cublasStatus_t status, const char* what) {
  STD_TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, current_op, ": ", what, ": ", cublasLtGetStatusName(status));
}

// All that an algorithm is chosen by.
using Key = std::array<std::int64_t, 17>;

struct KeyHash {
  std::size_t operator()(const Key& key) const {
    std::size_t hash = 0;
    for (const std::int64_t part : key) hash = (hash ^ static_cast<std::size_t>(part)) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 32;
  }
};

struct Plan {
  cublasStatus_t status;
  cublasLtMatmulAlgo_t algorithm;
  std::size_t workspace;
};

// Never destroyed: at exit the driver may be gone before it.
struct State {
  std::mutex mutex;
  std::unordered_map<int, cublasLtHandle_t> handles;
  std::unordered_map<Key, Plan, KeyHash> plans;
};

State& state() {
  static State& only = *new State;
  return only;
}

cublasLtHandle_t handle_of(State& all, int device) {
  cublasLtHandle_t& handle = all.handles[device];
  if (handle == nullptr) check(cublasLtCreate(&handle), "cublasLtCreate");
  return handle;
}

cudaDataType data_type(ScalarType dtype) {
  if (dtype == ScalarType::Half) return CUDA_R_16F;
  if (dtype == ScalarType::BFloat16) return CUDA_R_16BF;
  STD_TORCH_CHECK(dtype == ScalarType::Float, current_op, ": no product on a GPU in ", name_of(dtype));
  return CUDA_R_32F;
}

// The power of two, up to 256, that an address is a multiple of; 256 for none.
std::uint32_t alignment(const void* address) {
  const auto value = reinterpret_cast<std::uintptr_t>(address) | 256;
  return static_cast<std::uint32_t>(value & -value);
}

std::uint64_t most_workspace(const Tensor& beside) {
  const int major = device_attribute(beside, cudaDevAttrComputeCapabilityMajor);
  return (major >= 9 ? 32ull : 8ull) << 20;
}

// The descriptors of a product, which the library wants by address.
struct Description {
  Description(const Product& p, const Operands& o) {
    const cudaDataType in = data_type(p.in), out = data_type(p.out);
    const cublasComputeType_t compute =
        p.in == ScalarType::Float && p.tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    check(cublasLtMatmulDescInit(&operation, compute, CUDA_R_32F), "cublasLtMatmulDescInit");
    set(CUBLASLT_MATMUL_DESC_TRANSA, p.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_TRANSB, p.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, p.epilogue);
    if (p.epilogue != CUBLASLT_EPILOGUE_DEFAULT) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, o.vector);
    const std::int64_t a_rows = p.transpose_a ? p.k : p.m, b_rows = p.transpose_b ? p.n : p.k;
    describe(a, in, a_rows, p.transpose_a ? p.m : p.k, a_rows);
    describe(b, in, b_rows, p.transpose_b ? p.k : p.n, b_rows);
    describe(d, out, p.m, p.n, p.d_stride ? p.d_stride : p.m);
  }

  template <typename T>
  void set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    check(cublasLtMatmulDescSetAttribute(&operation, attribute, &value, sizeof value),
          "cublasLtMatmulDescSetAttribute");
  }

  static void describe(cublasLtMatrixLayoutOpaque_t& layout, cudaDataType type, std::int64_t rows,
                       std::int64_t columns, std::int64_t stride) {
    check(cublasLtMatrixLayoutInit(&layout, type, rows, columns, stride), "cublasLtMatrixLayoutInit");
  }

  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t a, b, d;
};

template <typename T>
void prefer(cublasLtMatmulPreferenceOpaque_t& preference, cublasLtMatmulPreferenceAttributes_t attribute,
            const T& value) {
  check(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof value),
        "cublasLtMatmulPreferenceSetAttribute");
}

Plan choose(cublasLtHandle_t handle, Description& description, const Operands& o, std::uint64_t workspace) {
  cublasLtMatmulPreferenceOpaque_t preference;
  check(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit");
  prefer(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace);
  // Partial sums of a split product in float32, added in a step of their own: neither their precision nor their
  // order is then left to chance.
  const std::uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  prefer(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions);
  prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(o.a));
  prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(o.b));
  prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(o.c));
  prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(o.d));
  cublasLtMatmulHeuristicResult_t best{};
  int found = 0;
  cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(handle, &description.operation, &description.a, &description.b,
                                     &description.d, &description.d, &preference, 1, &best, &found);
  if (status == CUBLAS_STATUS_SUCCESS) status = found > 0 ? best.state : CUBLAS_STATUS_NOT_SUPPORTED;
  return {status, best.algo, best.workspaceSize};
}

// CUBLAS_STATUS_SUCCESS, or why there is no algorithm.
cublasStatus_t matmul(const Product& p, const Operands& operands, const Tensor& beside) {
  Operands o = operands;
  if (!p.adds_c) o.c = o.d;  // it is not read
  const int device = beside.get_device_index();
  const RelaxedCapture relaxed;
  Description description(p, o);
  const Key key{device,
                p.m,
                p.n,
                p.k,
                p.transpose_a,
                p.transpose_b,
                static_cast<std::int64_t>(p.in),
                static_cast<std::int64_t>(p.out),
                p.tf32,
                p.adds_c,
                p.d_stride,
                p.epilogue,
                alignment(o.a),
                alignment(o.b),
                alignment(o.c),
                alignment(o.d),
                alignment(o.vector)};
  cublasLtHandle_t handle;
  Plan plan;
  {
    State& all = state();
    const std::lock_guard<std::mutex> lock(all.mutex);
    handle = handle_of(all, device);
    auto known = all.plans.find(key);
    if (known == all.plans.end()) {
      known = all.plans.emplace(key, choose(handle, description, o, most_workspace(beside))).first;
    }
    plan = known->second;
  }
  if (plan.status != CUBLAS_STATUS_SUCCESS) return plan.status;

  const float alpha = 1.0f, beta = p.adds_c ? 1.0f : 0.0f;
  const Tensor workspace =
      empty_beside(beside, {static_cast<std::int64_t>(plan.workspace)}, ScalarType::Byte);
  check(cublasLtMatmul(handle, &description.operation, &alpha, o.a, &description.a, o.b, &description.b, &beta,
                       o.c, &description.d, o.d, &description.d, &plan.algorithm, workspace.data_ptr(),
                       plan.workspace, current_stream(beside)),
        "cublasLtMatmul");
  return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

bool try_product(const Product& product, const Operands& operands, const Tensor& beside) {
  const cublasStatus_t status = matmul(product, operands, beside);
  // An epilogue that does not go with the types is one or the other, by version.
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE) return false;
  check(status, "cublasLtMatmulAlgoGetHeuristic");
  return true;
}

void run_product(const Product& product, const Operands& operands, const Tensor& beside) {
  check(matmul(product, operands, beside), "cublasLtMatmulAlgoGetHeuristic");
}

}  // namespace fastvit
