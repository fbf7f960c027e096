"""Other projects' kernels for the same ops: one table, with the reason where one is absent."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch


@dataclass(frozen=True)
class Peer:
    """`functions` maps an op's name to a loader of a function that takes the op's arguments."""

    package: str
    module: str
    device: str
    functions: dict[str, Callable[[], Callable[..., Any]]]

    def why_not(self, device: str) -> str | None:
        """Why it cannot be timed on `device`, or None."""
        if torch.device(device).type != self.device:
            return f"runs on {self.device} only"
        if find_spec(self.module) is None:
            return f"not installed (pip install {self.package})"
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


def _liger_group_norm() -> Callable[..., Any]:
    apply = _liger("group_norm", "LigerGroupNormFunction")
    return lambda x, groups, weight, bias, eps: apply(x, weight, bias, x.shape[1], groups, eps)


PEERS = (
    Peer(
        "liger-kernel",
        "liger_kernel",
        "cuda",
        {
            "rms_norm": _liger_rms_norm,
            "layer_norm": _liger_layer_norm,
            "add_rms_norm": _liger_add_rms_norm,
            "group_norm": _liger_group_norm,
        },
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
