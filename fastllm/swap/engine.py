"""swap(): plan without touching anything, change, prove, and go back at the first exception."""

from typing import Any

from torch import nn

from fastllm.core.backend import check_name
from fastllm.core.errors import UnsupportedError
from fastllm.core.op import OPS
from fastllm.core.run import as_calls
from fastllm.core.select import Paths, chosen, paths_of
from fastllm.core.tuner import table
from fastllm.swap import classes, rules, tuning, winners
from fastllm.swap import fused_loss as losses
from fastllm.swap import unpad as padding
from fastllm.swap.attention import Attention
from fastllm.swap.blocks import Finder
from fastllm.swap.experts import Experts
from fastllm.swap.handle import Handle
from fastllm.swap.mlp import MLP
from fastllm.swap.report import Report, Row
from fastllm.swap.rotary import Rotary
from fastllm.swap.verify import Verification

ALREADY = "already swapped"


def swap_model(
    model: nn.Module,
    include: Any = None,
    exclude: Any = None,
    verify: Any = None,
    backend: str | None = None,
    example_inputs: Any = None,
    tune: bool = False,
    fused_loss: bool = False,
    unpad: bool = False,
) -> Handle:
    """Puts fastllm's modules into `model`, in place, in this instance only.

    model    any torch.nn.Module
    include  what may be swapped: globs on module paths ("model.layers.*"), classes, or a
             callable(path, module) -> bool, alone or in a list; a module stands for all in it
    exclude  what may not, in the same form
    verify   inputs of the model: a tensor, a tuple of arguments, a dict of keyword arguments, or
             a list of such. Outputs and gradients are compared with float64 before and after;
             what is over the error budget is put back, and the report says so
    backend  forces a backend in every swapped module; None: the best one
    example_inputs  inputs in the same form, to tune with; without `verify`, it verifies, too
    tune     tunes the calls that the model makes (fastllm.tune), times every replaced module where
             it stands, and keeps only what wins; the report has the ratios. A GPU, or the CPU,
             has to be otherwise idle for the figures to mean something

    fused_loss  a Hugging Face causal LM given labels= computes its loss from the hidden states and
             never holds its logits; `logits` are computed when they are looked at, which has to be
             before the optimizer's step. Everything else of the model's forward is its own

    unpad    layers of Hugging Face encoders (BERT and its like, on a CPU) skip padding wherever
             that is proven to be safe: the same at every real token, and zeros, not what torch
             makes of them, in the hidden states of padding. It is proven by itself; `verify` and
             `tune` are done before it

    Returns a Handle: report(), restore(), a context manager. Swapping again does nothing. If
    anything is raised on the way, the model is as it was. Raises TypeError or ValueError naming
    the argument, and UnsupportedError when `backend` cannot run here.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    backend = check_name(backend)
    if tune and example_inputs is None:
        raise ValueError("example_inputs: expected the inputs to tune with, found None")
    verify = example_inputs if verify is None else verify
    if backend is not None:
        _check_available(backend)
    paths = paths_of(model)
    allowed = set(paths) if include is None else chosen(model, paths, "include", include)
    barred = set() if exclude is None else chosen(model, paths, "exclude", exclude)
    proof = None if verify is None else Verification(model, verify)
    handle = Handle(model)
    plan, rows = _plan(paths, allowed, barred, backend)
    if proof is not None:
        proof.before({m: choice for m, (_, choice) in plan.items()})
    try:
        for module, (path, choice) in plan.items():
            handle.change(path, module, choice.recipe)  # type: ignore[arg-type]
        blocks = _fuse(handle, paths, allowed, barred, backend, rows)
        if fused_loss:
            blocks |= _fuse_loss(handle, paths, allowed - barred, backend, rows)
        if proof is not None:
            proof.after(handle, rows, blocks)
        ratio, notes = _tuned(handle, rows, example_inputs) if tune else (None, [])
        rows += padding.unpad(handle, paths, allowed - barred) if unpad else []
    except BaseException:
        handle.restore()
        raise
    order = {names[0]: i for i, names in enumerate(paths.values())}
    handle._report = Report(sorted(rows, key=lambda row: order[row.path]))
    if proof is not None:
        handle._report.notes = [*proof.notes, *notes]
    handle._report.ratio = ratio
    return handle


def _tuned(handle: Handle, rows: list[Row], example_inputs: Any) -> tuple[float | None, list[str]]:
    """Each backend at its best first, then what wins; the whole model's ratio, and notes."""
    if not handle.modules:
        return None, []
    if table.MODE != "off":
        tuning.tune(handle.model, example_inputs)
    calls = as_calls(example_inputs, "example_inputs")
    ratio, notes = winners.keep_winners(handle, rows, calls)
    return ratio.value, notes


def _check_available(backend: str) -> None:
    reasons = {op: rules.why_no_backend(op, backend) for op in OPS}
    if all(reasons.values()):
        rows = [f"  {op}: {reason}" for op, reason in reasons.items()]
        raise UnsupportedError("\n".join([f"backend: {backend!r} cannot run here", *rows]))


def _plan(
    paths: Paths, allowed: set[nn.Module], barred: set[nn.Module], backend: str | None
) -> tuple[dict[nn.Module, tuple[str, rules.Choice]], list[Row]]:
    """What to change into what; nothing is changed yet."""
    adapters = (m for m in paths if m._modules.get("base_layer") is not None)
    context = rules.Context(backend, adapted={inner for m in adapters for inner in m.modules()})
    plan: dict[nn.Module, tuple[str, rules.Choice]] = {}
    rows: list[Row] = []
    for module, (path, *others) in paths.items():
        name = type(module).__name__
        if module not in allowed or module in barred:
            continue
        if classes.recipe_of(module) is not None:
            rows.append(Row(path, name, reason=ALREADY))
            continue
        choice = rules.choose(module, context)
        if choice is None:
            continue
        reason = choice.reason or classes.unfit(module)
        row = Row(path, name, reason=reason or "", kind=choice.kind)
        rows.append(row)
        if reason is None and choice.recipe is not None:
            plan[module] = (path, choice)
            offset = getattr(choice.recipe, "offset", 0.0)
            row.new = f"fastllm {choice.op}" + (f", weight + {offset:g}" if offset else "")
            row.new += f" (also {', '.join(others)})" if others else ""
            row.backend, row.error = rules.backend_name(choice, module), choice.error
    return plan, rows


def _fuse_loss(
    handle: Handle,
    paths: Paths,
    allowed: set[nn.Module],
    backend: str | None,
    rows: list[Row],
) -> dict[nn.Module, Row]:
    """Puts the fused loss behind the labels of every causal LM in the model."""
    done: dict[nn.Module, Row] = {}
    found = [
        (path, module, answer)
        for module, (path, *_) in paths.items()
        if module in allowed and (answer := losses.find(path, module, backend)) is not None
    ]
    if not found:
        name = type(handle.model).__name__
        raise ValueError(f"fused_loss: expected a transformers causal LM, found none in {name}")
    for path, module, (recipe, row) in found:
        rows.append(row)
        if recipe is not None:
            handle.change(path, module, recipe)
            done[module] = row
    return done


def _fuse(
    handle: Handle,
    paths: Paths,
    allowed: set[nn.Module],
    barred: set[nn.Module],
    backend: str | None,
    rows: list[Row],
) -> dict[nn.Module, Row]:
    """Fuses what can be fused in the parents of the modules that this handle swapped."""
    finder = Finder(set(handle.modules.values()), allowed - barred, backend)
    blocks: dict[nn.Module, Row] = {}
    for module, (path, *_) in paths.items():
        taken = isinstance(classes.recipe_of(module), Attention | Experts | MLP | Rotary)
        if module in barred or module in finder.swapped or taken:
            continue
        for recipe, row in finder.find(path, module):
            rows.append(row)
            if recipe is not None:
                handle.change(path, module, recipe)
                blocks[module] = row
    return blocks
