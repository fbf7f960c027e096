"""Other libraries' tensors, built here element by element from what their layouts say."""

import json

import pytest
import torch

from fastllm.ops.quant import layout
from fastllm.quant import QuantLinear, quantize, read_awq, read_bitsandbytes, read_gptq


def fourbit(kind, nested, shape=(6, 128), block=64, dtype="bfloat16"):
    """(state dict of a Linear4bit, the values it stands for)"""
    generator = torch.Generator().manual_seed(3)
    table = torch.tensor(layout.TABLES[layout.KINDS.index(kind)])
    count = shape[0] * shape[1]
    index = torch.randint(0, 16, (count,), generator=generator).tolist()
    absmax = (torch.rand(count // block, generator=generator) + 0.1).tolist()
    state = {"fc.weight.quant_map": table}
    facts = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": list(shape)}
    if nested:
        outer_map = torch.linspace(-1, 1, 256)
        codes = torch.randint(0, 256, (count // block,), generator=generator).tolist()
        outer, offset = [0.25, 0.5, 0.125], 0.75
        facts.update(nested_blocksize=5, nested_dtype="float32", nested_offset=offset)
        state["fc.weight.absmax"] = torch.tensor(codes, dtype=torch.uint8)
        state["fc.weight.nested_absmax"] = torch.tensor(outer)
        state["fc.weight.nested_quant_map"] = outer_map
        absmax = [float(outer_map[c]) * outer[i // 5] + offset for i, c in enumerate(codes)]
    else:
        state["fc.weight.absmax"] = torch.tensor(absmax)
    packed = [index[2 * i] * 16 + index[2 * i + 1] for i in range(count // 2)]
    state["fc.weight"] = torch.tensor(packed, dtype=torch.uint8)[:, None]
    text = json.dumps(facts).encode()
    name = f"fc.weight.quant_state.bitsandbytes__{kind}"
    state[name] = torch.tensor(list(text), dtype=torch.uint8)
    values = [float(table[c]) * absmax[i // block] for i, c in enumerate(index)]
    return state, torch.tensor(values).view(shape)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4bit(kind, nested):
    state, exact = fourbit(kind, nested)
    q = read_bitsandbytes(state, "fc.")
    assert q.dtype == torch.bfloat16 and q.shape == (6, 128) and str(q.format) == f"{kind}_g64"
    torch.testing.assert_close(q.dequantize(torch.float32), exact, rtol=1e-6, atol=1e-7)


def test_bitsandbytes_8bit():
    codes = torch.randint(-127, 128, (5, 33), dtype=torch.int8)
    absmax = torch.rand(5) + 1
    exact = torch.tensor(
        [[float(c) * float(s) / 127 for c in row] for row, s in zip(codes, absmax, strict=True)]
    )
    state = {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    q = read_bitsandbytes(state)
    torch.testing.assert_close(q.dequantize(torch.float32), exact, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="weight_format: expected 0"):
        read_bitsandbytes({**state, "weight_format": torch.tensor(1)})


def signed(word):
    """A 32-bit word as torch has it."""
    return word - (1 << 32) if word >= 1 << 31 else word


def integers(k=64, n=16, size=32):
    """Codes [K][N], zero points and scales [K / size][N]."""
    generator = torch.Generator().manual_seed(4)
    q = torch.randint(0, 16, (k, n), generator=generator).tolist()
    z = torch.randint(1, 17, (k // size, n), generator=generator).tolist()
    s = (torch.rand(k // size, n, generator=generator) + 0.5).half()
    exact = torch.tensor(
        [[(q[i][j] - z[i // size][j]) * float(s[i // size, j]) for i in range(k)] for j in range(n)]
    )
    return q, z, s, exact


def runs_saves_and_loads(q, exact):
    """As a layer, whose scales of 16 bits are not those that this library would make."""
    bias, x = torch.randn(q.shape[0], dtype=q.dtype), torch.randn(5, q.shape[1])
    layer = QuantLinear.from_qtensor(q, bias)
    assert layer.codes is q.codes and layer.bias.dtype == q.dtype
    wanted = torch.nn.functional.linear(x, exact, bias.float())
    made = layer.float()(x)
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-3)
    fresh = QuantLinear(layer.in_features, layer.out_features, format=str(q.format))
    fresh.load_state_dict(layer.state_dict())
    assert fresh.format == q.format and torch.equal(fresh(x), made)
    weight = torch.randn(layer.weight.shape)
    layer.set_weight(weight)  # from here on the scales are its own
    fresh.load_state_dict({"weight": weight, "bias": layer.bias})
    assert torch.equal(layer(x), fresh(x)) and str(layer.format) == str(q.format)


@pytest.mark.parametrize("v2", [False, True])
def test_gptq(v2):
    q, z, s, exact = integers()
    if v2:  # its zero points are stored as they are: 0 to 15
        z = [[value - 1 for value in row] for row in z]
        exact = exact + s.float().t().repeat_interleave(32, 1)
    k, n = len(q), len(q[0])
    words = [
        [signed(sum(q[8 * i + b][j] << 4 * b for b in range(8))) for j in range(n)]
        for i in range(k // 8)
    ]
    less = 0 if v2 else 1
    packed = [
        [signed(sum((row[8 * j + b] - less) << 4 * b for b in range(8))) for j in range(n // 8)]
        for row in z
    ]
    state = {
        "up.qweight": torch.tensor(words, dtype=torch.int32),
        "up.qzeros": torch.tensor(packed, dtype=torch.int32),
        "up.scales": s,
        "up.g_idx": torch.arange(k, dtype=torch.int32) // 32,
    }
    found = read_gptq(state, "up.", v2=v2)
    assert found.shape == (n, k) and found.dtype == torch.float16
    torch.testing.assert_close(found.dequantize(torch.float32), exact, rtol=1e-6, atol=1e-6)
    runs_saves_and_loads(found, exact)
    state["up.g_idx"] = state["up.g_idx"].flip(0)
    with pytest.raises(ValueError, match=r"up\.g_idx: expected groups of 32 neighbours"):
        read_gptq(state, "up.", v2=v2)


def test_awq():
    q, z, s, exact = integers()
    z = [[min(value, 15) for value in row] for row in z]
    exact = torch.tensor(
        [[(q[i][j] - z[i // 32][j]) * float(s[i // 32, j]) for i in range(64)] for j in range(16)]
    )
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def pack(rows):
        return torch.tensor(
            [
                [signed(sum(row[8 * j + order[b]] << 4 * b for b in range(8))) for j in range(2)]
                for row in rows
            ],
            dtype=torch.int32,
        )

    found = read_awq({"qweight": pack(q), "qzeros": pack(z), "scales": s})
    torch.testing.assert_close(found.dequantize(torch.float32), exact, rtol=1e-6, atol=1e-6)


def test_what_is_wrong_is_named():
    state, _ = fourbit("nf4", False)
    with pytest.raises(KeyError, match=r"fc\.weight\.absmax"):
        read_bitsandbytes({k: v for k, v in state.items() if "absmax" not in k}, "fc.")
    with pytest.raises(ValueError, match="quant_map: expected nf4's 16 numbers"):
        read_bitsandbytes({**state, "fc.weight.quant_map": torch.rand(16)}, "fc.")
    across, _ = fourbit("nf4", False, shape=(64, 65))
    with pytest.raises(ValueError, match="expected rows of whole blocks of 64"):
        read_bitsandbytes(across, "fc.")
    with pytest.raises(KeyError, match="quant_state"):
        read_bitsandbytes({"fc.weight": torch.rand(3)}, "fc.")
    with pytest.raises(KeyError, match="qweight"):
        read_gptq({}, "up.")
    words = {"qweight": torch.rand(2, 8), "qzeros": torch.rand(1, 1), "scales": torch.rand(1, 8)}
    for wrong, message in (
        ((torch.rand(2, 2),), "q: expected a QTensor, found Tensor"),
        ((quantize(torch.rand(8)),), "q: expected a matrix"),
        ((quantize(torch.rand(4, 8)), torch.rand(8)), r"bias: expected \[4\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            QuantLinear.from_qtensor(*wrong)
    for read in (read_gptq, read_awq):
        with pytest.raises(ValueError, match="qweight: expected an int32 matrix"):
            read(words)
