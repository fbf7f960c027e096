"""include= and exclude=: which modules a change of a model may touch."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

Paths = dict[nn.Module, list[str]]


def paths_of(model: nn.Module) -> Paths:
    """Every module and all the names it goes by: a shared module has several.

    TypeError for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    paths: Paths = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    return paths


def chosen(model: nn.Module, paths: Paths, argument: str, wish: Any) -> set[nn.Module]:
    """Modules that match `wish`, and all that is inside of them.

    wish: a glob on paths, a class, a callable(path, module) -> bool, or several of these in a list.
    """
    wishes = list(wish) if isinstance(wish, list | tuple | set | frozenset) else [wish]
    found: set[nn.Module] = set()
    for one in wishes:
        matches = _matcher(argument, one)
        hits = [m for m, names in paths.items() if any(matches(name, m) for name in names)]
        if not hits and (isinstance(one, str | type)):
            raise ValueError(
                f"{argument}: {one!r} matches no module of this {type(model).__name__}"
            )
        inside = not callable(one) or isinstance(one, type)
        for module in hits:
            found.update(module.modules() if inside else [module])
    return found


def _matcher(argument: str, wish: Any) -> Callable[[str, nn.Module], bool]:
    if isinstance(wish, str):
        return lambda path, module: fnmatchcase(path, wish)
    if isinstance(wish, type):
        return lambda path, module: isinstance(module, wish)
    if callable(wish):
        return wish
    raise TypeError(
        f"{argument}: expected globs on module paths, classes or a callable(path, module), "
        f"found {wish!r}"
    )
