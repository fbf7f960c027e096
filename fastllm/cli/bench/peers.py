"""Other projects' kernels for the same work: one table, pinned; the reason where one is absent.

The pins are what the functions named here were looked up in; they are the extras `peers` (which
install without a GPU) and `peers-cuda` of the package. What is no op (an optimizer) brings its
peers along in its own subject; the table knows them all the same.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch


@dataclass(frozen=True)
class Peer:
    """`functions` maps an op's name to a loader of a function that takes the op's arguments.

    `nothing` says why a peer without functions has none; None: subjects that are no ops name it.
    """

    package: str
    version: str
    module: str
    device: str | None  # None: any
    functions: Mapping[str, Callable[[], Callable[..., Any]]] = field(default_factory=dict)
    nothing: str | None = None

    def why_not(self, device: str) -> str | None:
        """Why it cannot be timed on `device`, or None."""
        if self.device not in (None, torch.device(device).type):
            return f"runs on {self.device} only"
        if self.nothing:
            return self.nothing
        if find_spec(self.module) is None:
            return f"not installed (pip install {self.package}=={self.version})"
        return None


def _liger(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name).apply


def _liger_rms_norm() -> Callable[..., Any]:
    apply = _liger("rms_norm", "LigerRMSNormFunction")
    return lambda x, shape, weight, eps, offset: apply(x, weight, eps, offset, "llama", False)


def _liger_layer_norm() -> Callable[..., Any]:
    apply = _liger("layer_norm", "LigerLayerNormFunction")
    return lambda x, shape, weight, bias, eps, offset: apply(x, weight, bias, eps)


def _liger_add_rms_norm() -> Callable[..., Any]:
    apply = _liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
    return lambda x, residual, shape, weight, eps, offset: apply(
        x, residual, weight, eps, offset, "llama", False
    )


def _liger_swiglu() -> Callable[..., Any]:
    return _liger("swiglu", "LigerSiLUMulFunction")


def _liger_relu2() -> Callable[..., Any]:
    return _liger("relu_squared", "LigerReLUSquaredFunction")


def _liger_geglu() -> Callable[..., Any]:
    apply = _liger("geglu", "LigerGELUMulFunction")

    def run(gate: torch.Tensor, up: torch.Tensor, approximate: str) -> Any:
        if approximate != "tanh":
            raise ValueError("has the tanh approximation only")
        return apply(gate, up)

    return run


def _quack_rms_norm() -> Callable[..., Any]:
    rmsnorm = importlib.import_module("quack.rmsnorm").rmsnorm
    return lambda x, shape, weight, eps, offset: rmsnorm(x, weight, eps=eps, weight_offset=offset)


def _liger_group_norm() -> Callable[..., Any]:
    apply = _liger("group_norm", "LigerGroupNormFunction")
    return lambda x, groups, weight, bias, eps: apply(x, weight, bias, x.shape[1], groups, eps)


PEERS = (
    Peer(
        "liger-kernel",
        "0.8.5",
        "liger_kernel",
        "cuda",
        {
            "rms_norm": _liger_rms_norm,
            "layer_norm": _liger_layer_norm,
            "add_rms_norm": _liger_add_rms_norm,
            "group_norm": _liger_group_norm,
            "swiglu": _liger_swiglu,
            "geglu": _liger_geglu,
            "relu2": _liger_relu2,
        },
    ),
    Peer("deepspeed", "0.19.8", "deepspeed", "cpu"),
    Peer("torchao", "0.18.0", "torchao", None),
    Peer("bitsandbytes", "0.50.2", "bitsandbytes", None),
    Peer("quack-kernels", "0.6.5", "quack", "cuda", {"rms_norm": _quack_rms_norm}),
    Peer("flash-attn", "2.8.3.post2", "flash_attn", "cuda", nothing="attention: none here"),
    Peer(
        "cut-cross-entropy",
        "25.1.1",
        "cut_cross_entropy",
        "cuda",
        nothing="cross entropy: none here",
    ),
)


def installed(op: str, device: str) -> dict[str, Callable[[], Callable[..., Any]]]:
    """The peers that can be timed for an op on `device`, by package."""
    return {
        peer.package: peer.functions[op]
        for peer in PEERS
        if op in peer.functions and peer.why_not(device) is None
    }


def absent(device: str) -> dict[str, str]:
    """Why the other peers are not in the tables, by package."""
    reasons = {peer.package: peer.why_not(device) for peer in PEERS}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def versions(device: str) -> dict[str, str]:
    """The versions of the peers that can be timed, and the pin where another one is installed."""
    found = {}
    for peer in PEERS:
        if peer.why_not(device) is None:
            try:
                here = version(peer.package)
            except PackageNotFoundError:
                here = "unknown"
            note = "" if here == peer.version else f" (known to work: {peer.version})"
            found[peer.package] = f"{here}{note}"
    return found
