// What a function needs to be the same on a CPU and on a GPU.
#pragma once

#if defined(__CUDACC__)
#define FASTVIT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTVIT_HOST_DEVICE inline __attribute__((always_inline))
#endif
