"""Adafactor (Shazeer and Stern, 2018) as torch has it: second moments by row and by column."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm import _C
from fastllm.optim.directed import EXTRAS, Directed, Way, along, computed, norms, wide
from fastllm.optim.factored import MOMENTS, begin, ways_there
from fastllm.optim.settings import SGD
from fastllm.optim.work import Work

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Rates(NamedTuple):
    """A group's settings; `floor` None is the parameter dtype's epsilon."""

    lr: float
    beta2_decay: float
    floor: float | None
    least: float
    d: float
    weight_decay: float
    factor: float
    stochastic: bool
    seed: int


class Adafactor(Directed, torch.optim.Adafactor):
    kind = SGD
    places = ()

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self.options("fp32", master_weights, stochastic_rounding, max_grad_norm, seed)
        super().__init__(params, lr, beta2_decay, eps, d, weight_decay, **kwargs)
        self._step_supports_amp_scaling = True

    def settings(self, group: dict[str, Any], factor: float) -> Any:
        return Rates(
            float(group["lr"]), group["beta2_decay"], group["eps"][0], group["eps"][1], group["d"],
            group["weight_decay"], factor, self.stochastic_rounding, self.seed,
        )  # fmt: skip

    def ways(self, work: Work, backend: str | None) -> list[Way]:
        params = wide(work)
        found = []
        for i, (p, length) in enumerate(zip(params, norms(params), strict=True)):
            found.append(self._way(work, i, p, length, backend != "reference"))
        return found

    def _way(self, work: Work, i: int, p: Tensor, length: float, fused: bool) -> Way:
        s: Any = work.settings
        state, grad = work.own[i], work.grads[i]
        if not state.keys() & set(MOMENTS):
            begin(state, work.params[i])
        time = state["step"].add_(1).item()
        mix, many = time**s.beta2_decay, max(p.numel(), 1)
        size = max(s.least, length / many**0.5) * min(s.lr, time**-0.5)
        floor = torch.finfo(work.params[i].dtype).eps if s.floor is None else s.floor
        if p.dim() < 2:
            u, squares = _whole(grad, state["variance"], mix, floor, s.factor)
        else:
            fused = fused and grad.is_cpu and grad.dtype in _CODES
            rule = _factored if fused else _factored_plain
            u, squares = rule(grad, state["row_var"], state["col_var"], mix, floor, s.factor)
        size /= max(1.0, (squares / many) ** 0.5 / s.d)
        return Way(u, size, 1.0 - s.lr * s.weight_decay)

    def on_device(
        self, works: list[Work], scale: Any, found: Any, max_norm: float | None, kernels: Any
    ) -> Tensor | None:
        device = works[0].params[0].device
        factor = torch.ones((), device=device)
        if scale is not None:
            factor = factor / scale.to(device)
        norm = None
        if max_norm is not None:
            every = torch._foreach_norm([g for w in works for g in w.grads], dtype=torch.float32)
            norm = torch.stack(every).norm() * factor
            factor = factor * (max_norm / (norm + 1e-6)).clamp(max=1.0)
        found = None if found is None else found.to(device, torch.float32)
        alongs, sizes = [], []
        for work in works:
            s: Any = work.settings
            assert work.steps is not None
            torch._foreach_add_(work.steps, 1.0 if found is None else 1.0 - found)
            lengths = torch._foreach_norm(wide(work), dtype=torch.float32)
            directions, far = ways_there(work, list(lengths), factor, found, kernels)
            alongs.append(along(work, directions, s.lr * s.weight_decay))
            sizes.append(far)
        kernels.run_along(alongs, sizes, found)
        return norm

    def _adopt(self, saved: dict[str, Any]) -> None:
        super()._adopt(saved)
        numbers = [n for g in saved["param_groups"] for n in g["params"]]
        params = [p for g in self.param_groups for p in g["params"]]
        for number, p in zip(numbers, params, strict=True):
            found = saved["state"].get(number, {})
            for name in found.keys() & set(MOMENTS):
                self.state[p][name] = found[name].to(p.device, computed(p))


def _whole(
    grad: Tensor, variance: Tensor, mix: float, floor: float, factor: float
) -> tuple[Tensor, float]:
    """(direction, its sum of squares) of a vector."""
    g = grad.to(variance.dtype) * factor
    variance.lerp_(g * g, mix)
    u = g * variance.clamp(min=floor * floor).rsqrt_()
    return u, u.double().square().sum().item()


def _factored_plain(
    grad: Tensor, row_var: Tensor, col_var: Tensor, mix: float, floor: float, factor: float
) -> tuple[Tensor, float]:
    """The same of matrices, in plain torch."""
    g = grad.to(row_var.dtype) * factor
    row_var.lerp_(g.square().mean(-1, keepdim=True), mix)
    col_var.lerp_(g.square().mean(-2, keepdim=True), mix)
    moment = row_var @ col_var
    moment.div_(row_var.mean(-2, keepdim=True).clamp_(min=floor))
    u = moment.clamp_(min=floor * floor).rsqrt_().mul_(g)
    return u, u.double().square().sum().item()


def _factored(
    grad: Tensor, row_var: Tensor, col_var: Tensor, mix: float, floor: float, factor: float
) -> tuple[Tensor, float]:
    """The same on the CPU kernels: two passes over the gradient."""
    g = grad.resolve_neg().contiguous()
    rows, cols = g.shape[-2:]
    by_row, by_col = torch.zeros_like(row_var), torch.zeros_like(col_var)
    u, threads, code = torch.zeros_like(g, dtype=torch.float32), torch.get_num_threads(), _CODES
    places = range(g.numel() // (rows * cols) if g.numel() else 0)

    def at(k: int, tensor: Tensor, elements: int) -> int:
        return tensor.data_ptr() + k * elements * tensor.element_size()

    for k in places:
        _C.optim_factor_squares(
            at(k, g, rows * cols), code[g.dtype], rows, cols, at(k, by_row, rows),
            at(k, by_col, cols), threads,
        )  # fmt: skip
    row_var.lerp_(by_row.mul_(factor**2 / max(cols, 1)), mix)
    col_var.lerp_(by_col.mul_(factor**2 / max(rows, 1)), mix)
    torch.div(row_var, row_var.mean(-2, keepdim=True).clamp_(min=floor), out=by_row)
    by_col.copy_(col_var)
    squares = 0.0
    for k in places:
        squares += _C.optim_factor_direction(
            at(k, g, rows * cols), code[g.dtype], rows, cols, at(k, by_row, rows),
            at(k, by_col, cols), floor * floor, factor, at(k, u, rows * cols), threads,
        )  # fmt: skip
    return u, squares


Adafactor.__doc__ = f"""torch.optim.Adafactor in three passes over memory; its arguments, and:
{EXTRAS}"""
