"""The CPU kernels below torch: C++ sources, and how they become a library.

Knows: AVX-512 and the memory layout of rows, weights and KV blocks. Does not know: torch, models, requests.
Start reading at `kernels.cpp`, which lists what Python calls. engine/kernels/native.py and
engine/attention/native.py are its only callers; without the library, torch does the same work more slowly.
"""
