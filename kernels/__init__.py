"""Triton kernels, one file a family. They import torch, triton and each other, nothing else.

Installed as ``fastllm.kernels``: a top-level ``kernels`` would shadow another project's.
"""

if __name__ != "fastllm.kernels":
    raise ImportError(f"import these kernels as fastllm.kernels, not as {__name__!r}")
