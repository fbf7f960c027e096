"""CASES of attention: lengths, widths, head groups, every kind of mask, hostile logits."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastllm.core.cases import Case
from fastllm.ops.quant import reference
from fastllm.ops.quant.layout import E4M3, INT4, INT8, KINDS

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16", FP64: "fp64"}
DTYPES = (FP32, BF16, FP16)

# B, H, G, T, S, D, Dv
Sizes = tuple[int, int, int, int, int, int, int]
# every length, T != S both ways, every width, each with a mask and options that take turns
SIZES: tuple[Sizes, ...] = (
    (1, 2, 2, 2, 3, 40, 40),
    (2, 4, 2, 3, 2, 64, 64),
    (1, 2, 1, 17, 64, 80, 80),
    (2, 2, 2, 64, 17, 64, 32),
    (1, 3, 1, 97, 113, 96, 96),
    (1, 2, 2, 113, 97, 128, 128),
    (1, 4, 2, 128, 128, 64, 64),
    (1, 1, 1, 137, 256, 64, 80),
    (1, 2, 1, 256, 137, 32, 32),
    (2, 8, 2, 1, 799, 64, 64),
    (1, 1, 1, 65, 33, 256, 256),
    (1, 1, 1, 33, 70, 8, 16),
    (2, 2, 2, 5, 0, 16, 16),
    (2, 2, 2, 0, 5, 16, 16),
)
LONG: tuple[Sizes, ...] = ((1, 2, 1, 799, 799, 64, 64), (1, 2, 2, 1024, 1024, 128, 128))
MASKS = ("none", "causal", "bool", "add", "bottom", "window", "pad", "add32", "row", "blind")
OPTIONS = ("plain", "cap", "alibi", "sinks", "drop", "all")
SEED = 0x1234_5678_9ABC_DEF1


def cases(op: str) -> tuple[Case, ...]:
    """All cases of one op of the family."""
    if op == "attention_quantized":
        return tuple(itertools.chain(_coded_bench(), _coded()))
    if op == "attention_cache":
        return tuple(itertools.chain(_cache_bench(), _cache()))
    if "varlen" in op:
        return tuple(itertools.chain(_varlen_bench(op), _varlen()))
    return tuple(itertools.chain(_bench(op), _dense(op)))


# ---- dense


def _bench(op: str) -> Iterator[Case]:
    if op != "attention":
        return
    llama, small = (1, 32, 8, 2048, 2048, 128, 128), (1, 32, 32, 1024, 1024, 64, 64)
    for sizes, dtype in itertools.product((llama, small), (BF16, FP32)):
        yield _case(sizes, dtype, "causal", tags={"bench"})
    yield _case(small, FP16, "causal", tags={"bench"})
    yield _case((1, 32, 1, 512, 512, 64, 64), FP32, tags={"bench"})
    yield _case((1, 8, 8, 2048, 2048, 64, 64), FP32, "half", tags={"bench"})
    for dtype in (BF16, FP16):
        yield _case((1, 32, 8, 1, 4096, 128, 128), dtype, tags={"bench"})
    yield _case((1, 1, 1, 1, 32768, 128, 128), FP32, tags={"bench"})


def _dense(op: str) -> Iterator[Case]:
    yield _case((2, 4, 2, 5, 7, 8, 8), FP32, "bottom", "cap", tags={"quick"})
    for dtype in (FP32, BF16, FP64):  # with every argument
        yield _case((2, 4, 2, 5, 7, 8, 8), dtype, "add", "all", tags={"quick"})
    if op != "attention":  # what an lse changes is the same everywhere
        for mask, option in (("causal", "plain"), ("none", "sinks"), ("blind", "cap")):
            yield _case((2, 4, 2, 65, 70, 32, 32), FP32, mask, option, tags={"quick"})
            yield _case((1, 2, 1, 33, 129, 64, 64), BF16, mask, option, tags={"quick"})
        yield _case((2, 2, 1, 3, 4, 4, 4), FP64, "window", tags={"quick"})
        return
    yield _case((1, 2, 1, 4, 3, 4, 6), FP64, "blind", "sinks", tags={"quick"})
    yield _case((1, 2, 2, 3, 4, 4, 4), FP64, "bottom", "cap", tags={"quick"})
    masks, options = itertools.cycle(MASKS), itertools.cycle(OPTIONS)
    for sizes, dtype in itertools.product(SIZES, DTYPES):
        yield _case(sizes, dtype, next(masks), next(options), tags={"quick"})
        next(options)  # so that in time every mask meets every option
    for dtype in DTYPES:  # with a sink: the gradient of one key alone is 0, and all of it is error
        yield _case((2, 2, 1, 1, 1, 16, 16), dtype, "none", "sinks", tags={"quick"})
    for mask in MASKS:
        yield _case((1, 2, 1, 70, 65, 16, 16), FP32, mask, tags={"quick"})
        yield _case((1, 2, 1, 65, 130, 64, 64), BF16, mask, tags={"quick"})
    for option in OPTIONS[1:]:
        yield _case((1, 2, 1, 66, 68, 16, 16), FP32, "causal", option, tags={"quick"})
    for layout in ("transposed", "expanded", "sliced"):
        yield _case((2, 4, 2, 37, 41, 32, 32), FP32, "causal", layout=layout, tags={"quick"})
    hostile = [*itertools.product(("equal", "large"), DTYPES), ("huge", FP16)]
    for values, dtype in hostile:
        yield _case((1, 2, 1, 33, 70, 64, 64), dtype, "causal", values=values, tags={"adversarial"})
    for sizes, dtype in itertools.product(LONG, DTYPES):
        yield _case(sizes, dtype, "causal", tags={"quick"} if dtype == BF16 else {"bench"})


def _case(
    sizes: Sizes,
    dtype: torch.dtype,
    mask: str = "none",
    option: str = "plain",
    values: str = "normal",
    layout: str = "plain",
    tags: set[str] = frozenset(),  # type: ignore[assignment]
) -> Case:
    b, h, g, t, s, d, dv = sizes

    def build(generator: torch.Generator) -> tuple:
        q = _tensor((b, h, t, d), layout, generator)
        k, v = _tensor((b, g, s, d), layout, generator), _tensor((b, g, s, dv), layout, generator)
        if values == "equal":
            q, k = torch.full_like(q, 0.5), torch.full_like(k, 0.5)
        elif values in ("large", "huge"):  # of a width where fp16 scores near 65504
            q, k = q * (20 if values == "large" else 60), k * (20 if values == "large" else 60)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        made, left, right, diagonal = _mask(mask, (b, h, t, s), dtype, generator)
        return (
            q,
            k,
            v,
            made,
            *_options(option, b, h, dtype, generator, d, (left, right, diagonal)),
        )

    name = f"b{b}h{h}g{g}t{t}s{s}d{d}" + f"v{dv}" * (dv != d) + f"-{NAMES[dtype]}-{mask}"
    extra = [
        x for x, usual in ((option, "plain"), (values, "normal"), (layout, "plain")) if x != usual
    ]
    return Case("-".join([name, *extra]), dtype, build, frozenset(tags))


def _tensor(shape: tuple[int, ...], layout: str, generator: torch.Generator) -> Tensor:
    b, h, t, d = shape
    if layout == "transposed":  # what a projection's view gives
        return torch.randn((b, t, h, d), generator=generator).transpose(1, 2)
    if layout == "expanded":
        return torch.randn((1, h, t, d), generator=generator).expand(shape)
    if layout == "sliced":  # no unit stride
        return torch.randn((b, h, t, 2 * d), generator=generator)[..., ::2]
    return torch.randn(shape, generator=generator)


def _mask(
    kind: str, full: tuple[int, int, int, int], dtype: torch.dtype, generator: torch.Generator
) -> tuple[Any, int, int, int]:
    """(attn_mask, window_left, window_right, diagonal)"""
    b, h, t, s = full
    free = (-1, -1, 0)
    if kind == "none":
        return (None, *free)
    if kind == "causal":
        return None, -1, 0, 0
    if kind == "bottom":
        return None, -1, 0, s - t
    if kind == "window":
        return None, 5, 3, s - t
    if kind == "pad":  # keys past each sequence's end
        ends = torch.randint(s // 2, s + 1, (b, 1, 1, 1), generator=generator)
        return (torch.arange(s) < ends, *free)
    if kind == "half":
        return (torch.arange(s).view(1, 1, 1, s) % 256 < 128, *free)
    if kind == "bool":
        return (torch.rand((b, 1, t, s), generator=generator) < 0.7, *free)
    if kind == "blind":  # rows that see nothing
        mask = torch.rand((1, h, t, s), generator=generator) < 0.5
        mask[:, :, ::3] = False
        return mask, -1, 0, s - t
    if kind == "row":  # one row for all queries, with -inf
        mask = torch.randn((1, h, 1, s), generator=generator)
        mask[torch.rand(mask.shape, generator=generator) < 0.3] = -torch.inf
        return (mask.to(dtype), *free)
    shape = (b, h, t, s) if kind == "add" else (1, 1, t, s)
    mask = torch.randn(shape, generator=generator)
    return (mask.to(dtype) if kind == "add" else mask.to(FP64 if dtype == FP64 else FP32), *free)


def _options(
    option: str,
    b: int,
    h: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    d: int,
    window: tuple[int, ...],
) -> tuple:
    """All arguments after the mask."""
    every = option == "all"
    kind = FP64 if dtype == FP64 else FP32
    slopes = sinks = seed = None
    if every or option == "alibi":
        slopes = torch.rand((b, h) if every else (h,), generator=generator).to(kind)
    if every or option == "sinks":
        sinks = torch.randn(h, generator=generator).to(dtype)
    if every or option == "drop":
        seed = torch.tensor([SEED])
    p = 0.0 if seed is None else 0.25
    softcap = 2.0 if every or option == "cap" else 0.0
    return (slopes, sinks, seed, p, d**-0.5, *window, softcap)


# ---- packed sequences

# H, G, D, Dv, lengths of queries, lengths of keys
PACKED: tuple[tuple[int, int, int, int, tuple[int, ...], tuple[int, ...]], ...] = (
    (2, 1, 16, 16, (5, 1, 3), (5, 1, 3)),
    (4, 2, 64, 64, (17, 64, 0, 97), (17, 64, 3, 97)),
    (2, 2, 40, 80, (1, 1, 2), (113, 137, 0)),
    (2, 1, 128, 128, (70, 33), (40, 65)),
)


def _varlen_bench(op: str) -> Iterator[Case]:
    if op != "attention_varlen":
        return
    lengths = (512, 37, 300, 150, 480, 64, 210, 295)
    for dtype in (BF16, FP32):
        yield _packed((12, 12, 64, 64, lengths, lengths), dtype, "none", tags={"bench"})


def _varlen() -> Iterator[Case]:
    yield _packed((2, 1, 4, 4, (3, 2), (4, 2)), FP32, "bottom", "cap", tags={"quick"})
    for dtype in (FP32, BF16, FP64):
        yield _packed((2, 1, 4, 4, (3, 2), (4, 2)), dtype, "bottom", "all", tags={"quick"})
    kinds = itertools.cycle(("none", "causal", "bottom", "window"))
    options = itertools.cycle(OPTIONS)
    for sizes, dtype in itertools.product(PACKED, DTYPES):
        yield _packed(sizes, dtype, next(kinds), next(options), tags={"quick"})
        next(options)


def _packed(
    sizes: tuple[int, int, int, int, tuple[int, ...], tuple[int, ...]],
    dtype: torch.dtype,
    kind: str,
    option: str = "plain",
    tags: set[str] = frozenset(),  # type: ignore[assignment]
) -> Case:
    h, g, d, dv, ts, ss = sizes

    def build(generator: torch.Generator) -> tuple:
        q = torch.randn((sum(ts), h, d), generator=generator).to(dtype)
        k = torch.randn((sum(ss), g, d), generator=generator).to(dtype)
        v = torch.randn((sum(ss), g, dv), generator=generator).to(dtype)
        ends = [torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32) for x in (ts, ss)]
        left, right = {"none": (-1, -1), "window": (5, 3)}.get(kind, (-1, 0))
        rest = _options(option, len(ts), h, dtype, generator, d, (left, right, 0))
        slopes, sinks, seed, p, scale, *_, softcap = rest
        return (
            q, k, v, *ends, slopes, sinks, seed, max(ts), max(ss), p, scale, left, right,
            kind in ("bottom", "window"), softcap,
        )  # fmt: skip

    name = f"h{h}g{g}d{d}" + f"v{dv}" * (dv != d) + f"-{len(ts)}x{max(ts)}-{NAMES[dtype]}-{kind}"
    return Case(name + f"-{option}" * (option != "plain"), dtype, build, frozenset(tags))


# ---- a cache

# B, H, G, T, S_max, D, Dv, page (0: contiguous)
CACHES: tuple[tuple[int, ...], ...] = (
    (3, 4, 2, 1, 130, 64, 64, 0),
    (2, 4, 1, 3, 70, 40, 80, 0),
    (2, 8, 2, 1, 300, 128, 128, 16),
    (2, 2, 2, 17, 64, 16, 16, 32),
)


def _cache_bench() -> Iterator[Case]:
    for dtype in (BF16, FP16):
        yield _cached((1, 32, 8, 1, 4096, 128, 128, 0), dtype, full=True, tags={"bench"})
        yield _cached((8, 32, 8, 1, 1024, 128, 128, 16), dtype, tags={"bench"})


def _cache() -> Iterator[Case]:
    for dtype in (FP32, BF16, FP64):
        yield _cached((2, 4, 2, 2, 9, 8, 8, 3), dtype, "all", tags={"quick"})
    options = itertools.cycle(("plain", "sinks", "cap", "alibi", "window"))
    for sizes, dtype in itertools.product(CACHES, DTYPES):
        yield _cached(sizes, dtype, next(options), tags={"quick"})
    yield _cached((2, 2, 1, 1, 64, 32, 32, 0), FP32, full=True, tags={"quick"})


def _cached(
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    option: str = "plain",
    full: bool = False,
    tags: set[str] = frozenset(),  # type: ignore[assignment]
) -> Case:
    b, h, g, t, room, d, dv, page = sizes

    def build(generator: torch.Generator) -> tuple:
        count = -(-room // page) if page else 0
        lead = (b * count, g, page) if page else (b, g, room)
        q = torch.randn((b, h, t, d), generator=generator).to(dtype)
        k = torch.randn((*lead, d), generator=generator).to(dtype)
        v = torch.randn((*lead, dv), generator=generator).to(dtype)
        used = torch.randint(t, room + 1, (b,), generator=generator)
        used = torch.full_like(used, room) if full else used
        table = None
        if page:
            table = torch.randperm(b * count, generator=generator).view(b, count).int()
        left = 5 if option in ("window", "all") else -1
        rest = _options("plain" if option == "window" else option, b, h, dtype, generator, d, ())
        slopes, sinks, _, _, scale, softcap = rest
        return (q, k, v, used.int(), table, slopes, sinks, scale, left, 0, softcap)

    name = f"b{b}h{h}g{g}t{t}s{room}d{d}" + f"v{dv}" * (dv != d) + f"p{page}" * (page > 0)
    name += f"-{NAMES[dtype]}-{option}" + "-full" * full
    return Case(name, dtype, build, frozenset(tags))


# ---- a cache of codes: (kind, group, symmetric) of keys, and of values

BYTES, BYTES_G32 = (INT8, 0, True), (INT8, 32, True)
NIBBLES, NIBBLES_G64, NIBBLES_ROW = (INT4, 32, False), (INT4, 64, True), (INT4, 0, True)
# what the kernels read as it is, and what they do not
CODED = (
    (BYTES, BYTES), (NIBBLES, NIBBLES), (BYTES_G32, NIBBLES_G64), (NIBBLES_ROW, BYTES),
    ((INT4, 0, False), NIBBLES_ROW), ((E4M3, 0, True), (INT8, 24, True)),
)  # fmt: skip


def _coded_bench() -> Iterator[Case]:
    for form in (BYTES, NIBBLES_ROW, NIBBLES):
        sizes = (1, 32, 8, 1, 4096, 128, 128, 0)
        yield coded(_cached(sizes, BF16, full=True, tags={"bench"}), form, form)


def _coded() -> Iterator[Case]:
    for dtype, pair in zip((FP32, BF16, FP64, FP32), CODED, strict=False):
        yield coded(_cached((2, 4, 2, 2, 9, 8, 8, 3), dtype, "all", tags={"quick"}), *pair)
    forms, options = itertools.cycle(CODED), itertools.cycle(("plain", "sinks", "cap", "window"))
    # with a width that is odd, and fills no vector
    for sizes in (*CACHES, (2, 6, 2, 2, 150, 71, 45, 0)):
        for dtype in DTYPES:
            case = _cached(sizes, dtype, next(options), tags={"quick"})
            yield coded(case, *next(forms))
            yield coded(case, *next(forms))
        next(forms)  # so that in time every dtype meets every format


def coded(case: Case, *forms: tuple[int, int, bool]) -> Case:
    """A case of a cache of numbers as one of codes: keys and values of these formats."""

    def build(generator: torch.Generator) -> tuple:
        query, k, v, *rest = case.build(generator)
        parts: list[Any] = []
        for x, (code, group, symmetric) in zip((k, v), forms, strict=True):
            codes, scales, zeros = reference.quantize(x.float(), code, group, symmetric)
            if case.dtype in (FP32, FP16) and code == INT4:  # as other libraries store them
                scales, zeros = scales.half(), zeros.half()
            parts += (codes, scales, None if symmetric else zeros, code, group, x.shape[-1])
        return (query, *parts, *rest)

    kinds = (f"{KINDS[c]}g{g}" + "z" * (not symmetric) for c, g, symmetric in forms)
    return Case("-".join((case.name, *kinds)), case.dtype, build, case.tags)
