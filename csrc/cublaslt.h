// One matrix product by cuBLASLt, in its own terms: every matrix is column-major.
#pragma once

#include <cublasLt.h>

#include "tensors.h"

namespace fastvit {

// d [m, n] = op(a) op(b), op(a) being [m, k] and op(b) [k, n], each without gaps between its columns, but for d's.
struct Product {
  std::int64_t m, n, k;
  bool transpose_a, transpose_b;
  ScalarType in, out;  // of a and b; of c, d and the epilogue's vector
  bool tf32;
  bool adds_c = false;  // d = op(a) op(b) + c, where c may be d
  std::int64_t d_stride = 0;  // from one column of c and d to the next, if not m
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
};

struct Operands {
  const void *a, *b;
  void* d;
  const void* c = nullptr;
  const void* vector = nullptr;  // the bias [m], or what BGRADB writes [n]
};

// Runs it on the current stream, or returns false where cuBLASLt has no algorithm for it. Sums are in float32
// and in a fixed order.
bool try_product(const Product& product, const Operands& operands, const Tensor& beside);

// The same for a product that has to be there.
void run_product(const Product& product, const Operands& operands, const Tensor& beside);

}  // namespace fastvit
