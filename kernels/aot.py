"""Compiles what a launcher would launch, for any GPU, on a machine without one.

A family proves its kernels by calling its launchers on meta tensors: `record` notes each launch
instead of making it, and `compile` builds it for a target, specialized as Triton would.

    launches = record(rms_norm_fwd, meta(4096, 1024), None, meta(1024), 1024, 1e-6, 0.0)
    binaries = [compile(launch, GPUTarget("cuda", 90, 32)) for launch in launches]

So what is proven is what runs: block sizes, warps and stages come from the launcher itself.
"""

import dataclasses
import inspect

import torch
import triton
from fastllm.kernels.device import MAX_THREADS
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One specialized kernel: what `compile` needs of a launch."""

    kernel: JITFunction
    signature: tuple  # (parameter, Triton type or "constexpr"), in order
    constants: tuple  # (parameter, value)
    aligned: tuple  # positions of arguments known to be divisible by 16
    options: tuple  # (num_warps, ...) as given

    def __str__(self):
        kept = [f"{n}={v}" for n, v in self.constants if n.isupper()]
        types = [t for n, t in self.signature if t.startswith("*")]
        options = [f"{n}={v}" for n, v in self.options]
        return (
            f"{self.kernel.__name__}[{' '.join(dict.fromkeys(types))}]({' '.join(kept + options)})"
        )


def meta(*shape, dtype=torch.float32):
    """A tensor without memory, aligned as torch aligns fresh ones."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _specialize(kernel, args, kwargs):
    names = [p.name for p in kernel.params]
    options = {k: v for k, v in kwargs.items() if k not in names}
    bound = inspect.signature(kernel.fn).bind(
        *args, **{k: v for k, v in kwargs.items() if k in names}
    )
    bound.apply_defaults()
    signature, constants, aligned = [], [], []
    for position, param in enumerate(kernel.params):
        value = bound.arguments[param.name]
        kind = "constexpr"
        if not param.is_constexpr and value is not None:
            if isinstance(value, torch.Tensor):
                kind = "*" + _TYPES[value.dtype]
                divisible = value.storage_offset() * value.element_size() % 16 == 0
            elif isinstance(value, bool):
                kind, divisible = "i1", False
            elif isinstance(value, int):
                kind = "i32" if -(2**31) <= value < 2**31 else "i64"
                divisible = value % 16 == 0 and not param.do_not_specialize
                if value == 1 and not param.do_not_specialize:
                    kind = "constexpr"
            else:
                kind, divisible = "fp32", False
        signature.append((param.name, kind))
        if kind == "constexpr":
            constants.append((param.name, value))
        elif divisible:
            aligned.append(position)
    return Launch(
        kernel, tuple(signature), tuple(constants), tuple(aligned), tuple(options.items())
    )


def record(launcher, *args, **kwargs):
    """The launches that launcher(*args, **kwargs) would make, without making them."""
    launches = []

    def note(kernel, *args, grid, warmup, **kwargs):
        launches.append(_specialize(kernel, args, kwargs))

    run, JITFunction.run = JITFunction.run, note
    try:
        launcher(*args, **kwargs)
    finally:
        JITFunction.run = run
    return launches


def compile(launch, target):
    """The compiled kernel of one launch for `target` (a triton GPUTarget)."""
    positions = {name: i for i, (name, _) in enumerate(launch.signature)}
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        constexprs={(positions[name],): value for name, value in launch.constants},
        attrs={(position,): [["tt.divisibility", 16]] for position in launch.aligned},
    )
    options = dict(launch.options)
    # launchers keep to MAX_WARPS of the machine they run on: here, to the target's
    options["num_warps"] = min(options.get("num_warps", 4), MAX_THREADS // target.warp_size)
    return triton.compile(source, target=target, options=options)
