"""Triton kernels, one file a family. They import torch, triton and each other, nothing else.

Installed as ``fastllm.kernels``. A checkout's root on sys.path makes this folder importable as
``kernels``, the name of another project: then it stands aside as an empty namespace package would,
so that whoever looks for that project (transformers does) finds it absent.
"""

if __name__ != "fastllm.kernels":
    __file__ = None  # type: ignore[assignment]
    __path__ = []
