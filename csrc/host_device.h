// What a function needs to be the same on a CPU and on a GPU.
#pragma once

#if defined(__CUDACC__)
#define FASTVIT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTVIT_HOST_DEVICE inline __attribute__((always_inline))
#endif

// For a GPU alone, and for a compiler without one, so that its tests can call it.
#if defined(__CUDACC__)
#define FASTVIT_DEVICE __device__ __forceinline__
#else
#define FASTVIT_DEVICE inline
#endif
