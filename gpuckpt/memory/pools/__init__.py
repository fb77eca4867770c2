"""Pools of memory with a hard limit: on the host, and CuPy's on a CUDA device."""
