"""Triton kernels of fastmem; installed as ``fastmem.kernels``."""
