"""What the fused optimizers share: the step, the formats of their states, loading and saving.

A fused optimizer is torch's own class with another step: one call updates all tensors. Groups,
hooks, schedulers, closures and the state_dict stay torch's.
"""

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastllm.core.backend import check_name, choice
from fastllm.core.errors import UnsupportedError
from fastllm.optim import cpu, device, states
from fastllm.optim import grads as gradients
from fastllm.optim.local import local
from fastllm.optim.settings import Settings
from fastllm.optim.work import Work, run

MASTER = "master_param"
_is_cpu = attrgetter("is_cpu")


class Fused(Optimizer):
    """Mixed into a torch optimizer. Subclasses name their kernel and states, and read a group.

    kind      the kernel (settings.ADAM, ...)
    places    state names in the kernel's order, of all states the optimizer can have
    counted   whether torch's state has a `step`; without one, a fresh momentum is the gradient
    direct    whether `kind` is the whole step; else apply() and, on a device, on_device() are
    """

    kind: int
    places: tuple[str, ...]
    counted = True
    direct = True
    own = ("state_dtype", "master_weights", "stochastic_rounding", "max_grad_norm", "seed")

    def options(
        self,
        state_dtype: str,
        master_weights: bool,
        stochastic_rounding: bool,
        max_grad_norm: float | None,
        seed: int,
    ) -> None:
        """Takes over the keywords that torch's optimizers do not have; before their __init__."""
        if state_dtype not in states.STATE_DTYPES:
            known = ", ".join(states.STATE_DTYPES)
            raise ValueError(f"state_dtype: expected one of {known}, found {state_dtype!r}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: expected None or more than 0, found {max_grad_norm}")
        self.state_dtype = state_dtype
        self.master_weights = bool(master_weights)
        self.stochastic_rounding = bool(stochastic_rounding)
        self.max_grad_norm = max_grad_norm
        self.seed = int(seed)
        # on a device it is a tensor there
        self.grad_norm: float | Tensor | None = (
            None  # of the last step, where max_grad_norm is given
        )
        self.measured_norm: float | None = None  # of gradients that a GradScaler has just read
        self.backend_used: str | None = None
        self._step_supports_amp_scaling = True

    def __getstate__(self) -> dict[str, Any]:
        more = {name: getattr(self, name) for name in self.own}
        return {**super().__getstate__(), "fastllm": more}

    def __setstate__(self, state: dict[str, Any]) -> None:
        more = state.pop("fastllm", None)
        super().__setstate__(state)
        if more is not None:
            self.options(**more)

    # ---- to be told by the subclass

    def settings(self, group: dict[str, Any], factor: float) -> Settings:
        """The kernel's settings of a parameter group."""
        raise TypeError(f"{type(self).__name__} does not read its groups")

    def kept(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The states of `places` that this group has."""
        return self.places

    def on_device(
        self, works: list[Work], scale: Any, found: Any, max_norm: float | None, kernels: Any
    ) -> Tensor | None:
        """The whole step by `kernels` (cuda.py or triton.py), waiting for nothing. Returns the norm
        that was clipped."""
        raise TypeError(f"{type(self).__name__} has no step on a device")

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the parameters that have a gradient; `closure` recomputes and returns the loss.

        Raises RuntimeError for sparse gradients, fastllm.UnsupportedError when the backend that
        was asked for cannot serve.
        """
        plain = self.max_grad_norm is None
        if torch.compiler.is_compiling() and plain and self.not_torch() is None:
            return self._stock_step()(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    def update(self) -> None:
        """One step with the gradients that are there."""
        if device.step(self):
            return
        found = getattr(self, "found_inf", None)
        if found is not None and found.item():
            self.measured_norm = None
            return
        factor = self._factor()
        name = choice.name
        special = any(g.get("capturable") or g.get("differentiable") for g in self.param_groups)
        if name in (None, "cpu") and not special and self._at_once(factor):
            self.backend_used = "cpu"
            return
        elsewhere = name is None and not self._on_cpu() and self.not_torch() is None
        if name == "torch" or (name is None and special) or elsewhere:
            reason = self.not_torch()
            if reason is not None:
                raise UnsupportedError(f"{type(self).__name__}: backend 'torch': {reason}")
            self._stock(factor)
            return
        works = [self.collect(group, index, factor) for index, group in self.numbered()]
        self.backend_used = self.apply([w for w in works if w.params], check_name(name))

    def apply(self, works: list[Work], backend: str | None) -> str | None:
        """Updates everything; returns the name of what ran."""
        return run(self.kind, works, backend)

    def _on_cpu(self) -> bool:
        """Whether all parameters are: the kernels are there, torch's own step is elsewhere."""
        return all(all(map(_is_cpu, group["params"])) for group in self.param_groups)

    def not_torch(self) -> str | None:
        """Why torch's own step cannot do this step, or None."""
        if self.state_dtype != "fp32":
            return f"states are {self.state_dtype}"
        if self.master_weights or self.stochastic_rounding:
            return "torch has no master weights and no stochastic rounding"
        for group in self.param_groups:
            for p in group["params"]:
                if p.dtype in states.LOW:
                    return f"{p.dtype} parameters with float32 states"
        return None

    def _stock(self, factor: float) -> None:
        """torch's own step; it neither unscales nor clips, so it gets gradients that are."""
        given: dict[str, Any] = {
            n: self.__dict__.pop(n) for n in ("grad_scale", "found_inf") if n in self.__dict__
        }
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        kept = [p.grad for p in params] if factor != 1.0 else []
        try:
            for p, grad in zip(
                params, torch._foreach_mul(kept, factor) if kept else (), strict=False
            ):
                p.grad = grad
            self._stock_step()(self)
            self.backend_used = "torch"
        finally:
            for p, grad in zip(params, kept, strict=False):
                p.grad = grad
            self.__dict__.update(given)

    def _stock_step(self) -> Callable[..., Any]:
        """torch's step without the hooks around it: they have run."""
        classes = type(self).__mro__
        after = classes[classes.index(Fused) + 1 :]
        found: Any = next(vars(c)["step"] for c in after if "step" in vars(c))
        return found.__wrapped__ if getattr(found, "hooked", False) else found

    def _factor(self) -> float:
        """What all gradients are multiplied by: 1 / loss scale, and clipping."""
        scale = getattr(self, "grad_scale", None)
        factor = 1.0 if scale is None else 1.0 / float(scale)
        if self.max_grad_norm is None:
            return factor
        norm, self.measured_norm = self.measured_norm, None
        if norm is None:
            params = (p for g in self.param_groups for p in g["params"])
            norm = gradients.norm_of([p.grad for p in params if p.grad is not None])[0]
        self.grad_norm = norm * factor
        clip = self.max_grad_norm / (self.grad_norm + 1e-6)
        return factor if clip > 1.0 else factor * clip  # NaN goes on

    def numbered(self) -> Iterable[tuple[int, dict[str, Any]]]:
        """Groups with the number of their first parameter."""
        at = 0
        for group in self.param_groups:
            yield at, group
            at += len(group["params"])

    def _at_once(self, factor: float) -> bool:
        """The step in one call, from the second one on; False: nothing was done."""
        if not self.direct:
            return False
        coded = self.state_dtype in ("int8", "fp8")
        master = MASTER if self.master_weights else None
        step = "step" if self._counts() else None
        groups = []
        for first, group in self.numbered():
            settings = self.settings(group, -factor if group.get("maximize") else factor)
            kept = self.kept(group)
            scales = [f"{n}_scale" for n in kept[:2]] if coded else []
            names = (*kept, None, None, None)[:3] + (*scales, None, None)[:2] + (master, step)
            groups.append((settings, group["params"], names, first))
        return cpu.run_all(self.kind, groups, self.state)

    def _counts(self) -> bool:
        """Whether states have a `step`."""
        return self.counted or self.state_dtype != "fp32" or self.stochastic_rounding

    def collect(self, group: dict[str, Any], first: int, factor: float) -> Work:
        """What the kernel needs of one group."""
        every = group["params"]
        found = [p.grad for p in every]
        have = [i for i, grad in enumerate(found) if grad is not None]
        params, given = [every[i] for i in have], [found[i] for i in have]
        names = self.kept(group)
        counted = self._counts()
        state = self.state if names or counted or self.master_weights else {p: {} for p in params}
        own = [state[p] for p in params]
        fresh = None
        key = names[0] if names else "step"
        if names or counted:
            for p, grad, s in zip(params, given, own, strict=True):
                if s.get(key) is None:
                    self._init(p, grad, s, names, counted)
        if not self.counted and names:
            fresh = [s.pop("fresh", False) for s in own]
        if self.master_weights:
            for p, s in zip(params, own, strict=True):
                if p.dtype in states.LOW and MASTER not in s:
                    s[MASTER] = p.detach().float()
        coded = self.state_dtype in ("int8", "fp8")
        lists = [[s[n] for s in own] for n in names]
        scales = [[s.get(f"{n}_scale") for s in own] for n in names[:2]] if coded else []
        masters = [s.get(MASTER) for s in own] if self.master_weights else None
        steps = [s["step"] for s in own] if counted else None
        settings = self.settings(group, -factor if group.get("maximize") else factor)
        work = Work(
            settings, params, given, lists, scales, masters, steps, fresh,
            [first + i for i in have], own, names, type(self).__name__,
        )  # fmt: skip
        return local(work)

    def _init(
        self, param: Tensor, grad: Tensor, state: dict, names: Iterable[str], counted: bool
    ) -> None:
        """The first state of a parameter."""
        if grad.is_sparse:
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        if self.stochastic_rounding and param.dtype == torch.float16:
            raise ValueError(
                "stochastic_rounding: expected bfloat16 or float32 parameters, found float16 "
                "(master_weights=True serves them)"
            )
        if counted:
            wide = torch.get_default_dtype() == torch.float64
            state["step"] = torch.zeros((), dtype=torch.float64 if wide else torch.float32)
        kept = states.format_of(param, self.state_dtype)
        for place, name in enumerate(names):
            state[name], scales = states.zeros(param, kept, place)
            if scales is not None:
                state[f"{name}_scale"] = scales
        if names and not self.counted:
            state["fresh"] = True

    # ---- loading

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states arrive as they were saved, or in this optimizer's format.

        torch would cast codes, scales and master weights to the parameters' dtype.
        """
        seen: dict[str, Any] = {}

        def before(_: Optimizer, found: dict[str, Any]) -> None:
            seen.update(found)

        def after(_: Optimizer) -> None:
            self._adopt(seen)

        hooks = [
            self.register_load_state_dict_pre_hook(before),
            self.register_load_state_dict_post_hook(after, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _adopt(self, saved: dict[str, Any]) -> None:
        """Replaces what torch cast by what was saved."""
        numbers = [n for g in saved["param_groups"] for n in g["params"]]
        params = [p for g in self.param_groups for p in g["params"]]
        for number, param in zip(numbers, params, strict=True):
            found = saved["state"].get(number)
            if not found:
                continue
            state = self.state[param]
            if MASTER in found:
                state[MASTER] = found[MASTER].to(param.device)
            if MASTER in found and not self.master_weights:
                del state[MASTER]
            for place, name in enumerate(self.places):
                if isinstance(found.get(name), Tensor):
                    self._adopt_one(param, state, found, place, name)

    def _adopt_one(self, param: Tensor, state: dict, found: dict, place: int, name: str) -> None:
        kept = states.format_of(param, self.state_dtype)
        value, scales = found[name].to(param.device), found.get(f"{name}_scale")
        wanted, room = states.zeros(param, kept, place)
        if value.dtype == wanted.dtype and (scales is None) == (room is None):
            state[name] = value
            if scales is not None:
                state[f"{name}_scale"] = scales.to(param.device)
            return
        state.pop(f"{name}_scale", None)
        if scales is not None:
            plain = states.decode_saved(states.flat(value), scales.to(param.device), place)
        else:
            plain = states.flat(value.float() if value.is_floating_point() else value)
        code = states.code_of(kept, place)
        if code is None:
            states.flat(wanted).copy_(plain)
        else:
            codes, room = states.encode(plain, code, 0)
            states.flat(wanted.view(torch.uint8)).copy_(codes.view(torch.uint8))
            state[f"{name}_scale"] = room
        state[name] = wanted
