"""The handle of a swap: what it changed, and the way back."""

from collections.abc import Callable
from typing import Any

from torch import nn

from fastllm.swap import classes
from fastllm.swap.classes import Recipe
from fastllm.swap.report import Report
from fastllm.swap.rewrite import FuseAdds


class Handle:
    """One swap. `report()` tells what was done, `restore()` undoes it; also a context manager.

    `modules` maps paths to the modules that this swap changed. Several handles on one model,
    nested or not, may be restored in any order.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = {}
        self._report = Report()
        self._undo: dict[nn.Module, Callable[[], None]] = {}

    def report(self) -> Report:
        """What was swapped, what was left alone and why. Printing it gives a table."""
        return self._report

    def restore(self) -> None:
        """Gives the original back, bit for bit. A second call does nothing."""
        for path, module in self.modules.items():
            if classes.recipe_of(module) is not None and not classes.made(type(module)):
                raise RuntimeError(
                    f"restore: {path!r} became a {type(module).__name__} after the swap; "
                    "undo that first (nothing was restored)"
                )
        for module in list(self._undo):
            self.put_back(module)

    def change(self, path: str, module: nn.Module, recipe: Recipe) -> None:
        """Gives `module` the class of `recipe`."""
        before: dict[str, Any] = {
            n: vars(module)[n] for n in ("forward", "_old_forward") if n in vars(module)
        }
        classes.assign(module, classes.make(classes.original(module), _merged(module, recipe)))
        self.modules[path] = module
        self._undo[module] = lambda: _revert(module, recipe, before)

    def put_back(self, module: nn.Module) -> None:
        """Undoes what this handle did to one module."""
        self._undo.pop(module)()
        self.modules = {p: m for p, m in self.modules.items() if m is not module}

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: Any) -> None:
        self.restore()

    def __str__(self) -> str:
        return str(self._report)

    def __repr__(self) -> str:
        return f"<fastllm.swap of {type(self.model).__name__}: {self._report.summary}>"

    def __rich__(self) -> Any:
        return self._report.__rich__()


def _merged(module: nn.Module, recipe: Recipe) -> Recipe:
    """A block may have been rewritten for other norms by another swap: both hold."""
    present = classes.recipe_of(module)
    if isinstance(present, FuseAdds) and isinstance(recipe, FuseAdds):
        return FuseAdds(tuple(sorted({*present.norms, *recipe.norms})))
    return recipe


def _revert(module: nn.Module, recipe: Recipe, before: dict[str, Any]) -> None:
    base, present = classes.original(module), classes.recipe_of(module)
    if present is None:  # taken out by fastllm.swap.restore
        return
    rest: tuple[str, ...] = ()
    if isinstance(present, FuseAdds) and isinstance(recipe, FuseAdds):
        rest = tuple(n for n in present.norms if n not in recipe.norms)
    classes.assign(module, classes.make(base, FuseAdds(rest)) if rest else base)
    for name, value in before.items():
        if vars(module).get(name) == value:  # an equal bound method: the very object that was there
            vars(module)[name] = value


def restore(model: nn.Module) -> int:
    """Takes every swap out of `model`, whoever made it: for a loaded or deep-copied swapped model.

    Returns the number of modules that were given their original class back.
    """
    swapped = [m for m in model.modules() if classes.made(type(m))]
    for module in swapped:
        classes.assign(module, classes.original(module))
    return len(swapped)
