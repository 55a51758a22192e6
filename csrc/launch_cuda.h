// Launches: the current stream, the size of a device, and what an error says.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>

#include "rows.h"
#include "scope.h"

// torch declares it only where USE_CUDA is defined, and that changes more of its headers.
extern "C" AOTI_TORCH_EXPORT AOTITorchError aoti_torch_get_current_cuda_stream(std::int32_t, void**);

namespace fastvit {

inline cudaStream_t current_stream(const Tensor& beside) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(beside.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, current_op, ": ", what, ": ", cudaGetErrorString(status));
}

// While a graph is captured, a call that may allocate is an error, even where it has nothing to do with the
// graph: creating a handle, or loading a kernel for the first time. In here it is not.
class RelaxedCapture {
 public:
  RelaxedCapture() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode"); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

inline int device_attribute(const Tensor& beside, cudaDeviceAttr attribute) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, beside.get_device_index()), "cudaDeviceGetAttribute");
  return value;
}

// What grids that walk over their rows are measured by: it depends on the device alone, and so do their sums.
inline std::int64_t multiprocessors(const Tensor& beside) {
  return device_attribute(beside, cudaDevAttrMultiProcessorCount);
}

// Whether a kernel may begin while the one before it ends (FASTVIT_PDL=1, from Hopper on). Every kernel launched so
// waits for that end in each of its blocks, before it touches memory. Its own end then comes after that of all kernels
// before it, and memory that one of them still reads is not written by a later one.
inline bool begins_early(const Tensor& beside) {
  static const bool asked = [] {
    const char* value = std::getenv("FASTVIT_PDL");
    return value != nullptr && value[0] == '1';
  }();
  return asked && device_attribute(beside, cudaDevAttrComputeCapabilityMajor) >= 9;
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

template <typename T>
const T* data_of(const Tensor& x) {
  return static_cast<const T*>(x.data_ptr());
}

template <typename T>
const T* data_of(const OptionalTensor& x) {
  return x ? data_of<T>(*x) : nullptr;
}

template <typename T>
T* output_of(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// What a norm takes from each row of x, which is read once, and nothing else.
Statistics norm_statistics(const Tensor& x, const Norm& norm);

// The activation of rows, written over them.
void activate_in_place(const Tensor& rows, Activation activation);

}  // namespace fastvit
