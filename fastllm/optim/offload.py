"""Optimizer states on the CPU for parameters on a device; the step overlaps with the transfers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from fastllm.optim.base import Fused
from fastllm.optim.grads import norm_of
from fastllm.optim.local import is_dtensor

BUCKET = 64 << 20  # bytes of parameters that are transferred and updated together


class CPUOffload(Optimizer):
    """Runs `optimizer`, one of fastllm's, on the CPU for parameters that are on a device.

    The states, and a copy of the parameters, are on the CPU. While one bucket of parameters is
    updated, the next one's gradients arrive and the last one's parameters leave. `max_grad_norm`,
    loss scaling and all else that the optimizer does stay as they are; schedules, hooks, zero_grad
    and state_dict are this object's, and the state_dict is the optimizer's. Parameters that are on
    the CPU already are updated where they are.

    Raises TypeError for another optimizer, ValueError for one that has stepped and for DTensors.

    >>> optimizer = CPUOffload(fastllm.optim.AdamW(model.parameters(), max_grad_norm=1.0))
    """

    def __init__(self, optimizer: Fused, bucket: int = BUCKET) -> None:
        if not isinstance(optimizer, Fused):
            raise TypeError(
                f"optimizer: expected one of fastllm.optim, found {type(optimizer).__name__}"
            )
        if optimizer.state:
            raise ValueError("optimizer: expected one that has not stepped, found states")
        if bucket <= 0:
            raise ValueError(f"bucket: expected more than 0 bytes, found {bucket}")
        groups = [dict(group) for group in optimizer.param_groups]
        super().__init__(groups, dict(optimizer.defaults))
        self.inner = optimizer
        self._step_supports_amp_scaling = True
        away = [p for g in self.param_groups for p in g["params"] if self._is_away(p)]
        if any(map(is_dtensor, away)):
            raise ValueError("optimizer: expected whole parameters on the device, found DTensors")
        self._twins = {p: Twin(p) for p in away}
        for group in optimizer.param_groups:
            group["params"] = [
                self._twins[p].here if p in self._twins else p for p in group["params"]
            ]
        twins = {twin.here for twin in self._twins.values()}
        self._here = [p for g in optimizer.param_groups for p in g["params"] if p not in twins]
        self.state = optimizer.state
        self._buckets = _buckets(list(self._twins.values()), bucket)
        self._lanes = {p.device: Lane(p.device) for p in away}

    def _is_away(self, p: Tensor) -> bool:
        return not p.is_cpu

    # states are the inner optimizer's
    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, on the CPU."""
        self._settings_in()
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the optimizer's."""
        self.inner.load_state_dict(state_dict)
        self.state = self.inner.state
        for mine, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            mine.update({k: v for k, v in theirs.items() if k != "params"})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while this is constructed."""
        if hasattr(self, "inner"):
            raise ValueError("param_group: add it to the optimizer before CPUOffload takes it over")
        super().add_param_group(param_group)

    def _settings_in(self) -> None:
        """What schedules wrote into the groups."""
        for mine, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            theirs.update({k: v for k, v in mine.items() if k != "params"})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The optimizer's step; the parameters on the device are new when it returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found is not None and found.item():
            return loss
        self._settings_in()
        inner = self.inner
        if scale is not None:
            inner.grad_scale = scale.cpu()  # type: ignore[attr-defined]
        try:
            self._run(self._norm())
        finally:
            inner.__dict__.pop("grad_scale", None)
        return loss

    def _norm(self) -> float | None:
        """Of all gradients, before the first bucket is updated."""
        if self.inner.max_grad_norm is None:
            return None
        squares = 0.0
        devices: dict[Any, list[Tensor]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    devices.setdefault(p.device, []).append(p.grad)
        for device, grads in devices.items():
            if device.type == "cpu":
                squares += norm_of(grads)[0] ** 2
            else:
                squares += torch.nn.utils.get_total_norm(grads).double().item() ** 2
        return squares**0.5

    def _run(self, norm: float | None) -> None:
        for bucket in self._buckets:  # gradients set out, all of them
            for twin in bucket:
                twin.fetch(self._lanes)
        if any(p.grad is not None for p in self._here):
            self._update(norm)
        waiting = [(p, p.grad) for p in self._here]
        for p in self._here:
            p.grad = None
        try:
            for bucket in self._buckets:
                self._one(bucket, norm)
        finally:
            for p, grad in waiting:
                p.grad = grad
        for lane in self._lanes.values():
            lane.join()

    def _one(self, bucket: list["Twin"], norm: float | None) -> None:
        """Updates a bucket whose gradients are on their way."""
        arrived = [twin for twin in bucket if twin.arrived()]
        if not arrived:
            return
        try:
            self._update(norm)
        finally:
            for twin in arrived:
                twin.here.grad = None
        for twin in arrived:
            twin.send(self._lanes)

    def _update(self, norm: float | None) -> None:
        self.inner.measured_norm = norm
        self.inner.update()


class Lane:
    """Transfers to and from one device, beside its computations."""

    def __init__(self, device: torch.device) -> None:
        self.module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self.stream: Any = self.module.Stream(device) if self.module else None
        self.device = device

    def copy(self, to: Tensor, source: Tensor) -> Any:
        """Starts a copy after what has been computed; returns an event, None when it is done."""
        if self.module is None:
            to.copy_(source)
            return None
        self.stream.wait_stream(self.module.current_stream(self.device))
        with self.module.stream(self.stream):
            to.copy_(source, non_blocking=True)
            event = self.module.Event()
            event.record()
        if source.device == self.device:
            source.record_stream(self.stream)
        return event

    def join(self) -> None:
        """What is computed from now on comes after the transfers."""
        if self.module is not None:
            self.module.current_stream(self.device).wait_stream(self.stream)


class Twin:
    """A parameter on a device and its copy on the CPU."""

    def __init__(self, away: Any) -> None:
        self.away = away
        pinned = not away.is_cpu
        here = torch.empty_like(away, device="cpu", pin_memory=pinned)
        self.here = Parameter(here, requires_grad=away.requires_grad)
        self.grad: Tensor | None = None
        self.version = -1  # of `away` when the copy was made
        self.event: Any = None
        self.pending = False
        self.sent: Any = None

    def fetch(self, lanes: dict[Any, Lane]) -> None:
        """Starts the gradient's way here, and the parameter's if somebody wrote it."""
        self.here.grad, self.pending = None, self.away.grad is not None
        if not self.pending:
            return
        lane = lanes[self.away.device]
        if self.sent is not None:
            self.sent.synchronize()
        if self.version != self.away._version:
            lane.copy(self.here.data, self.away.detach())
        given = self.away.grad
        if self.grad is None or self.grad.dtype != given.dtype:
            self.grad = torch.empty_like(self.here, dtype=given.dtype, pin_memory=not given.is_cpu)
        self.event = lane.copy(self.grad, given)

    def arrived(self) -> bool:
        """Waits for the gradient; whether there is one."""
        if self.pending:
            if self.event is not None:
                self.event.synchronize()
            if self.grad is not None and self.grad.dtype != self.here.dtype:
                self.here.grad_dtype = self.grad.dtype  # type: ignore[attr-defined]
            self.here.grad = self.grad
        return self.pending

    def send(self, lanes: dict[Any, Lane]) -> None:
        """Starts the new parameter's way to the device."""
        self.sent = lanes[self.away.device].copy(self.away.detach(), self.here.detach())
        self.version = self.away._version


def _buckets(twins: list[Twin], size: int) -> list[list[Twin]]:
    """Parameters in order, about `size` bytes of them at a time."""
    found: list[list[Twin]] = [[]]
    held = 0
    for twin in twins:
        if held >= size:
            found.append([])
            held = 0
        found[-1].append(twin)
        held += twin.away.nbytes
    return found
