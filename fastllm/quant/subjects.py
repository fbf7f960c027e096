"""Quantized linear layers for the bench, against torch's own: in floats, and its quantized ones."""

import copy
import importlib
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.core.measure import Factory
from fastllm.core.op import OPS
from fastllm.core.proof import prove
from fastllm.core.subject import Scenario, Subject, Trial, register
from fastllm.ops.quant import quantize
from fastllm.ops.quant.layout import INT4, INT8, NF4
from fastllm.ops.quant_linear import quant_linear
from fastllm.ops.quant_linear.spec import DYNAMIC, FLOAT
from fastllm.quant import layer_subjects  # noqa: F401 (registers its own)

N = K = 4096
GROUP = 32  # of int4
GROUPS = {INT8: 0, INT4: GROUP, NF4: 64}
TOKENS = (1, 4, 16, 64, 512, 2048)
CACHE = 256 << 20  # bytes that outgrow it


def _sets(nbytes: int) -> int:
    return min(32, 1 + CACHE // nbytes)


def _ours(
    tokens: int, dtype: torch.dtype, code: int, mode: int, sets: int, device: str
) -> Callable[[int], Any]:
    group = GROUPS[code]
    weight = torch.randn(N, K, device=device) * K**-0.5
    codes, scales, _ = quantize(weight, code, group)
    held = [(codes.clone(), scales.clone()) for _ in range(sets)]
    x = torch.randn(tokens, K, device=device).to(dtype)
    return lambda i: quant_linear(x, *held[i % sets], code=code, group=group, activations=mode)


def _linear(tokens: int, dtype: torch.dtype, sets: int, device: str) -> Callable[[int], Any]:
    held = [torch.randn(N, K, device=device).to(dtype) for _ in range(sets)]
    x = torch.randn(tokens, K, device=device).to(dtype)
    return lambda i: F.linear(x, held[i % sets])


def _dynamic(tokens: int, dtype: torch.dtype, sets: int) -> Callable[[int], Any]:
    """torch.ao's quantized linear: fbgemm or oneDNN, one scale a tensor, float32 only."""
    if dtype != torch.float32:
        raise RuntimeError("quantize_dynamic takes float32 only")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = torch.nn.Sequential(torch.nn.Linear(K, N, bias=False))
        made = [
            torch.ao.quantization.quantize_dynamic(plain, {torch.nn.Linear}, dtype=torch.qint8)
            for _ in range(sets)
        ]
    x = torch.randn(tokens, K)
    return lambda i: made[i % sets](x)


def _pack_mm(tokens: int, dtype: torch.dtype, code: int, sets: int) -> Callable[[int], Any]:
    """torch's weight-only products, which torch.compile uses and torchao calls."""
    x = torch.randn(tokens, K).to(dtype)
    if code == INT8:
        codes = torch.randint(-127, 128, (N, K), dtype=torch.int8)
        held = [(codes.clone(), torch.rand(N).to(dtype)) for _ in range(sets)]
        return lambda i: torch._weight_int8pack_mm(x, *held[i % sets])
    nibbles = torch.randint(0, 16, (N, K), dtype=torch.int32)
    packed = [torch._convert_weight_to_int4pack_for_cpu(nibbles, 1) for _ in range(sets)]
    scales = torch.randn(K // GROUP, N, 2).to(dtype)
    return lambda i: torch._weight_int4pack_mm_for_cpu(x, packed[i % sets], GROUP, scales)


def _int_mm(tokens: int, sets: int) -> Callable[[int], Any]:
    """The product of int8 alone: nothing is quantized, scaled or rounded."""
    held = [torch.randint(-127, 128, (N, K), dtype=torch.int8) for _ in range(sets)]
    x = torch.randint(-127, 128, (tokens, K), dtype=torch.int8)
    return lambda i: torch._int_mm(x, held[i % sets].t())


def _copies(layer: torch.nn.Module, x: Tensor, sets: int) -> Callable[[int], Any]:
    """Calls on layers that lie apart in memory; each is called once, since some pack then."""
    layers = [layer, *(copy.deepcopy(layer) for _ in range(sets - 1))]

    def call(i: int) -> Any:
        with torch.no_grad():
            return layers[i % sets](x)

    for i in range(sets):
        call(i)
    return call


def _torchao(
    tokens: int, dtype: torch.dtype, code: int, mode: int, sets: int, device: str
) -> Callable[[int], Any]:
    """torchao, eager; of its int4 kernels none takes a CPU, its portable form does."""
    api = importlib.import_module("torchao.quantization")
    if code == INT8:
        dynamic = "Int8DynamicActivationInt8WeightConfig"
        config = getattr(api, "Int8WeightOnlyConfig" if mode == FLOAT else dynamic)()
    else:
        dynamic = "Int8DynamicActivationIntxWeightConfig"
        groups = importlib.import_module("torchao.quantization.granularity").PerGroup(GROUP)
        kind = getattr(api, "IntxWeightOnlyConfig" if mode == FLOAT else dynamic)
        name = "granularity" if mode == FLOAT else "weight_granularity"
        config = kind(weight_dtype=vars(torch)["int4"], **{name: groups})
    linear = torch.nn.Linear(K, N, bias=False, device=device, dtype=dtype)
    layer = torch.nn.Sequential(linear)
    api.quantize_(layer, config)
    return _copies(layer.eval(), torch.randn(tokens, K, device=device).to(dtype), sets)


def _bitsandbytes(
    tokens: int, dtype: torch.dtype, code: int, sets: int, device: str
) -> Callable[[int], Any]:
    """LLM.int8 without outliers, and nf4: it has no int4."""
    nn = importlib.import_module("bitsandbytes").nn
    weight = torch.randn(N, K, dtype=dtype) * K**-0.5
    if code == INT8:
        layer = nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False, threshold=0.0)
        layer.weight = nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = nn.Linear4bit(K, N, bias=False, compute_dtype=dtype, quant_type="nf4")
        layer.weight = nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    x = torch.randn(tokens, K, device=device).to(dtype)
    return _copies(layer.to(device).eval(), x, sets)


def _nbytes(code: int) -> int:
    return N * K // (1 if code == INT8 else 2)


def _trial(
    tokens: int, dtype: torch.dtype, code: int, mode: int, device: str, direction: str
) -> Trial:
    nbytes = _nbytes(code)
    sets = _sets(nbytes)
    stock: dict[str, Factory] = {
        "eager": partial(_linear, tokens, dtype, _sets(N * K * dtype.itemsize), device)
    }
    if device == "cpu" and mode == FLOAT and code != NF4:
        stock["pack_mm"] = partial(_pack_mm, tokens, dtype, code, sets)
    elif device == "cpu" and code == INT8:
        stock["quantize_dynamic"] = partial(_dynamic, tokens, dtype, sets)
        stock["_int_mm"] = partial(_int_mm, tokens, sets)
    few = sets if tokens <= 64 else 1
    peers: dict[str, Factory] = {}
    if code != NF4 and find_spec("torchao"):
        peers["torchao"] = partial(_torchao, tokens, dtype, code, mode, few, device)
    if (code, mode) in ((INT8, DYNAMIC), (NF4, FLOAT)) and find_spec("bitsandbytes"):
        peers["bitsandbytes"] = partial(_bitsandbytes, tokens, dtype, code, few, device)
    return Trial(
        ours=partial(_ours, tokens, dtype, code, mode, sets, device),
        stock=stock,
        peers=peers,
        nbytes=nbytes + tokens * (N + K) * dtype.itemsize,
        flops=2 * tokens * N * K,
        sets=sets,
        cold=True,
        backend="cpu" if device == "cpu" else "triton",
        counts=None if mode == FLOAT else torch.int8,
    )


def _wrong(dtype: torch.dtype, code: int, mode: int, device: str) -> str | None:
    """The first of the op's own small cases of this kind that fails."""
    op = OPS["quant_linear"]
    for case in op.cases:
        args: tuple[Tensor | int | None, ...] = case.args()
        if case.dtype != dtype or "quick" not in case.tags or (args[6], args[8]) != (code, mode):
            continue
        proof = prove(op, case, device=device)
        if not proof.ok:
            return proof.message
    return None


_MODES = (
    ("int8_dynamic", INT8, DYNAMIC, (torch.float32, torch.bfloat16)),
    ("int8_weight", INT8, FLOAT, (torch.float32, torch.bfloat16)),
    ("int4_weight", INT4, FLOAT, (torch.float32, torch.bfloat16)),
    ("nf4_weight", NF4, FLOAT, (torch.float32, torch.bfloat16)),
    ("int4_dynamic", INT4, DYNAMIC, (torch.bfloat16,)),
)
for _name, _code, _mode, _dtypes in _MODES:
    register(
        Subject(
            f"linear_{_name}",
            "quant_linear",
            [
                Scenario(
                    f"{tokens}x{K}x{N}-{'fp32' if dtype == torch.float32 else 'bf16'}",
                    dtype,
                    _nbytes(_code) + tokens * N * K // 50,
                    partial(_trial, tokens, dtype, _code, _mode),
                    partial(_wrong, dtype, _code, _mode),
                )
                for dtype in _dtypes
                for tokens in TOKENS
            ],
        )
    )
