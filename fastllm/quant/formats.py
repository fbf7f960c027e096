"""Formats: what a quantized tensor's codes are, and which values share a scale."""

import re
from dataclasses import dataclass, replace

import torch

from fastllm.ops.quant import layout
from fastllm.ops.quant.layout import FP4, INT4, KINDS, MXFP8, NF4

_BITS = {"int8": 8, "int4": 4, "nf4": 4, "fp4": 4, "fp8_e4m3": 8, "fp8_e5m2": 8, "mxfp8": 8}
_PATTERN = re.compile(
    r"(?P<kind>int8|int4|nf4|fp4|fp8_e4m3|fp8_e5m2|fp8|mxfp8)(?P<asym>_asym)?"
    r"(?:_(?P<where>g[1-9]\d*|row|tensor|block[1-9]?\d*))?(?P<double>_double)?"
)
NESTED = 256
"""Scales that share one scale where they are quantized themselves."""


@dataclass(frozen=True)
class Format:
    """How a tensor is quantized. Frozen and hashable; `str()` gives the name that `parse` reads.

    kind         int8, int4, nf4, fp4, fp8_e4m3, fp8_e5m2 or mxfp8
    group        n > 0: neighbours along the last dimension that share a scale (the last group of a
                 row may be short); 0: a row (a channel of a weight, a token of an activation);
                 -1: the whole tensor; -b: a block of b x b over the last two dimensions
    symmetric    False, for int4 only: 16 codes between the smallest and the largest value of a
                 group (and 0), with a zero point
    scale_dtype  None: what `quantize` makes, which is bfloat16 for int4, e8m0 bytes for mxfp8 and
                 float32 for the others. Another one is of tensors that come from elsewhere
    double       nf4 and fp4: the scales are quantized, too (QLoRA, Dettmers et al. 2023)

    Raises ValueError for what does not go together.
    """

    kind: str
    group: int = 0
    symmetric: bool = True
    scale_dtype: torch.dtype | None = None
    double: bool = False

    def __post_init__(self) -> None:
        code = layout.kind_code(self.kind)
        if type(self.group) is not int:
            raise ValueError(f"group: expected an int, found {self.group!r}")
        if code == MXFP8 and self.group != 32:
            raise ValueError(f"group: expected 32 for mxfp8, found {self.group}")
        if not self.symmetric and code != INT4:
            raise ValueError(f"symmetric: expected True for {self.kind}, found False")
        if self.double and code not in (NF4, FP4):
            raise ValueError(f"double: expected False for {self.kind}, found True")
        made = layout.scales_dtype(code)
        floats = (torch.float32, torch.bfloat16, torch.float16)
        if self.scale_dtype is None:
            object.__setattr__(self, "scale_dtype", made)
        elif self.scale_dtype not in ((made,) if code == MXFP8 else floats):
            raise ValueError(f"scale_dtype: expected {made}, found {self.scale_dtype}")

    @property
    def code(self) -> int:
        """The kind's number, as the ops take it."""
        return KINDS.index(self.kind)

    @property
    def bits(self) -> int:
        """Bits of one code, without its share of the scales."""
        return _BITS[self.kind]

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte."""
        return layout.packed(self.code)

    def codes_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the codes of a tensor of this shape."""
        return layout.codes_shape(tuple(shape), self.code)

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales (and zeros) of a tensor of this shape."""
        return layout.scales_shape(tuple(shape), self.group)

    def __str__(self) -> str:
        name = self.kind + ("" if self.symmetric else "_asym")
        if self.group > 0 and self.kind != "mxfp8":
            name += f"_g{self.group}"
        elif self.group < 0:
            name += "_tensor" if self.group == -1 else f"_block{-self.group}"
        elif self.kind in ("int4", "nf4", "fp4"):
            name += "_row"  # without a word they have groups
        return name + "_double" * self.double


_DEFAULT_GROUPS = {"int4": 32, "nf4": 64, "fp4": 64, "mxfp8": 32}

# int4's group is that of llama.cpp's Q4_0: 4.5 bits a weight, 1.6 dB better than 128's 4.125
PRESETS: dict[str, Format] = {
    "int8": Format("int8"),
    "int8_tensor": Format("int8", -1),
    "int8_g32": Format("int8", 32),
    "int4": Format("int4", 32),
    "int4_g32": Format("int4", 32),
    "int4_g64": Format("int4", 64),
    "int4_g128": Format("int4", 128),
    "int4_asym_g32": Format("int4", 32, symmetric=False),
    "int4_asym_g64": Format("int4", 64, symmetric=False),
    "int4_asym_g128": Format("int4", 128, symmetric=False),
    "nf4": Format("nf4", 64),
    "nf4_double": Format("nf4", 64, double=True),
    "fp4": Format("fp4", 64),
    "fp4_double": Format("fp4", 64, double=True),
    "fp8": Format("fp8_e4m3"),
    "fp8_tensor": Format("fp8_e4m3", -1),
    "fp8_block": Format("fp8_e4m3", -128),
    "fp8_e5m2": Format("fp8_e5m2"),
    "mxfp8": Format("mxfp8", 32),
}


def parse(name: "str | Format") -> Format:
    """The format of a name: a preset, or kind[_asym][_gN | _row | _tensor | _blockN][_double].

    >>> parse("int4_asym_g64")
    Format(kind='int4', group=64, symmetric=False, scale_dtype=torch.bfloat16, double=False)

    A Format is returned as it is. Raises ValueError for a name that is none, TypeError for what is
    not a name.
    """
    if isinstance(name, Format):
        return name
    if not isinstance(name, str):
        raise TypeError(f"format: expected a name or a Format, found {type(name).__name__}")
    if name in PRESETS:
        return PRESETS[name]
    found = _PATTERN.fullmatch(name)
    if found is None:
        raise ValueError(
            f"format: expected one of {', '.join(PRESETS)}, or a kind with a group such as "
            f"'int8_g64', found {name!r}"
        )
    kind = "fp8_e4m3" if found["kind"] == "fp8" else found["kind"]
    group = _group(found["where"], _DEFAULT_GROUPS.get(kind, 0))
    return Format(kind, group, found["asym"] is None, double=found["double"] is not None)


def _group(word: str | None, default: int) -> int:
    if word is None:
        return default
    if word.startswith("g"):
        return int(word[1:])
    if word.startswith("block"):
        return -int(word[5:] or 128)
    return {"row": 0, "tensor": -1}[word]


def with_scales(format: Format, dtype: torch.dtype) -> Format:
    """The same format with scales of another dtype, for tensors that come from elsewhere."""
    return replace(format, scale_dtype=dtype)
