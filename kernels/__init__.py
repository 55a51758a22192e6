"""fastvit's Triton kernels: a file for each op, with its `@triton.jit` functions and a thin launcher.

They install as the package `fastvit_kernels` and import torch and triton only.
"""
