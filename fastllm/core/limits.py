"""What this machine can do at most, measured when asked: copying, reading, multiplying matrices."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastllm.core.measure import Call, Factory, copies, interleave, rotation

_BIG = 256 << 20  # bytes: past every cache
_SIDE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Limits:
    """Bytes a second of copying (read plus written) and of reading; FLOP/s by dtype."""

    copy: float
    read: float
    matmul: dict[str, float]
    threads: int


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


def matmul_peak(
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    budget: float = 0.5,
    threads: int | None = None,
    side: int | None = None,
) -> float:
    """FLOP/s of the fastest square matrix product: on CPUs oneDNN's may beat the default."""
    n = side or _SIDE.get(torch.device(device).type, 2048)

    def factory(product: Callable) -> Call:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return lambda i: product(a, b)

    products: dict[str, Callable] = {"mm": torch.mm}
    if torch.device(device).type == "cpu" and torch.backends.mkldnn.is_available():
        products["onednn"] = _onednn
    found = interleave(
        {name: functools.partial(factory, product) for name, product in products.items()},
        device=device,
        budget=budget,
        threads=threads,
        min_rounds=3,
    )
    return 2 * n**3 / min(map(found.seconds, found.samples))


def _onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def measure_limits(
    device: str | torch.device = "cpu", threads: int | None = None, budget: float = 2.0
) -> Limits:
    """All of them, in about `budget` seconds and what the slowest product takes."""
    gpu = torch.device(device).type == "cuda"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)[: 3 if gpu else 2]
    share = budget / (2 + len(dtypes))
    return Limits(
        copy_bandwidth(_BIG, device, share, threads),
        read_bandwidth(_BIG, device, share, threads),
        {
            str(dtype).removeprefix("torch."): matmul_peak(dtype, device, share, threads)
            for dtype in dtypes
        },
        threads or torch.get_num_threads(),
    )
