"""What this machine can do at most, measured when asked: copying, reading, dense products."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastllm import _C
from fastllm.core.measure import Call, Factory, copies, interleave, rotation

_BIG = 256 << 20  # bytes: past every cache
_SIDES = {"cpu": (256, 1024, 2048), "cuda": (1024, 4096, 8192)}  # a core peaks on less than all
# codes of csrc/cpu/types.h; fp16 is computed in fp32
_ARITHMETIC = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 0, torch.int8: 3}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


@dataclass(frozen=True)
class Limits:
    """Bytes a second of copying (read plus written) and of reading; FLOP/s by dtype.

    The peaks are those of the fastest dense product that stock PyTorch has: fp32 FMA, and the dot
    products of bf16, fp16 and int8 where the machine has them.
    """

    copy: float
    read: float
    matmul: dict[str, float]
    threads: int

    def peak(self, dtype: str) -> float:
        """Operations a second for arithmetic on `dtype`; what has no units of its own uses fp32."""
        plain = self.matmul.get("float32", 0.0)
        return max(self.matmul.get(dtype, 0.0), plain)


def copying(nbytes: int, device: str | torch.device = "cpu") -> Factory:
    """A candidate: `nbytes` moved by copying half as many into an existing tensor.

    The call has input sets of its own; the index it is given picks one of them.
    """
    size = max(nbytes // 8, 1)  # fp32 elements, read once and written once
    sets = rotation(4 * size, device)

    def factory() -> Call:
        (sources,) = zip(*copies((torch.randn(size, device=device),), sets), strict=True)
        target = torch.empty_like(sources[0])
        return lambda i: target.copy_(sources[i % sets])

    return factory


def copy_bandwidth(
    nbytes: int = _BIG,
    device: str | torch.device = "cpu",
    budget: float = 0.5,
    threads: int | None = None,
) -> float:
    """Bytes a second when `nbytes` are moved by a copy into an existing tensor."""
    sets = rotation(nbytes // 2, device)
    found = interleave(
        {"copy": copying(nbytes, device)}, sets=sets, device=device, budget=budget, threads=threads
    )
    return nbytes / found.seconds("copy")


def read_bandwidth(
    nbytes: int = _BIG,
    device: str | torch.device = "cpu",
    budget: float = 0.5,
    threads: int | None = None,
) -> float:
    """Bytes a second of a sum over `nbytes`."""
    sets = rotation(nbytes, device)

    def factory() -> Call:
        sources = copies((torch.randn(nbytes // 4, device=device),), sets)
        return lambda i: sources[i][0].sum()

    found = interleave({"sum": factory}, sets=sets, device=device, budget=budget, threads=threads)
    return nbytes / found.seconds("sum")


def arithmetic(
    dtype: torch.dtype, device: str | torch.device = "cpu", threads: int | None = None
) -> tuple[Factory, int] | None:
    """A candidate and the operations of a call: multiply-adds on registers alone, on all threads.

    fp32 by FMA, bf16 and int8 by dot products or tiles where the machine has them, on mixed
    numbers: nothing can be faster.
    None where this cannot be measured: on a GPU, and for types that are not computed so.
    """
    if dtype not in _ARITHMETIC or torch.device(device).type != "cpu":
        return None
    count = threads or torch.get_num_threads()
    code, rounds = _spin(_ARITHMETIC[dtype], _C.isa())
    return lambda: lambda i: _C.peak(code, rounds, count), count * _C.peak(code, rounds, 1)


@functools.cache
def _spin(code: int, isa: str) -> tuple[int, int]:
    """The faster of a type's own arithmetic and fp32's at level `isa`, and rounds of 0.5 ms."""
    found: dict[int, tuple[float, int]] = {}
    for tried in {code, 0}:
        rounds, seconds = 1 << 9, 0.0
        while seconds < 4e-4:
            rounds *= 2
            begin = time.perf_counter()
            operations = _C.peak(tried, rounds, 1)
            seconds = time.perf_counter() - begin
        found[tried] = operations / seconds, rounds
    best = max(found, key=lambda tried: found[tried])
    return best, found[best][1]


def matmul_peak(
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    budget: float = 0.5,
    threads: int | None = None,
    sides: Sequence[int] | None = None,
) -> float:
    """Operations a second of the fastest square product: on CPUs oneDNN's may beat the default.

    The fastest sample counts: a limit is what can be reached. 0 where torch has no such product.
    """
    best = 0.0
    sides = sides or _SIDES.get(torch.device(device).type, _SIDES["cpu"])
    for n in sides:
        if best and 2 * n**3 / best > 1.0:
            break  # a dtype that this machine emulates: larger products would take minutes
        found = interleave(
            {name: _product(f, n, dtype, device) for name, f in _products(dtype, device).items()},
            device=device,
            budget=budget / len(sides),
            threads=threads,
            min_rounds=3,
        )
        best = max([best, *(2 * n**3 / min(taken) for taken in found.samples.values())])
    return best


def _products(dtype: torch.dtype, device: str | torch.device) -> dict[str, Callable]:
    if dtype == torch.int8:
        return {"int_mm": lambda a, b: torch._int_mm(a, b.t())}  # GPUs want b by columns
    found: dict[str, Callable] = {"mm": torch.mm}
    if torch.device(device).type == "cpu" and torch.backends.mkldnn.is_available():
        found["onednn"] = _onednn
    return found


def _product(product: Callable, n: int, dtype: torch.dtype, device: str | torch.device) -> Factory:
    def factory() -> Call:
        if dtype == torch.int8:
            a, b = (torch.randint(-127, 128, (n, n), dtype=dtype, device=device) for _ in range(2))
        else:
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return lambda i: product(a, b)

    return factory


def _onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def measure_limits(
    device: str | torch.device = "cpu", threads: int | None = None, budget: float = 2.0
) -> Limits:
    """All of them, in about `budget` seconds and what the slowest product takes."""
    share = budget / (2 + len(_DTYPES))
    peaks = {str(x).removeprefix("torch."): matmul_peak(x, device, share, threads) for x in _DTYPES}
    return Limits(
        copy_bandwidth(_BIG, device, share, threads),
        read_bandwidth(_BIG, device, share, threads),
        {name: peak for name, peak in peaks.items() if peak},
        threads or torch.get_num_threads(),
    )
