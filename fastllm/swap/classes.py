"""Classes made for a swap: a subclass of a module's own class with another forward.

A recipe says what is different. (base class, recipe) -> class is cached, and pickles and deepcopies
rebuild the class from that pair, so that a swapped model can be saved and sent to other processes.
"""

import weakref
from typing import Any, Protocol

from torch import nn

from fastllm.core.instances import assign as assign
from fastllm.core.instances import is_bound


class Recipe(Protocol):
    """What a made class does. Hashable and picklable: a key of the cache, a part of pickles."""

    def bases(self, base: type) -> tuple[type, ...]:
        """The classes to derive from; `base` is among their ancestors."""

    def namespace(self, base: type) -> dict[str, Any]:
        """What is put into the made class."""


_MADE: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def make(base: type, recipe: Recipe) -> type:
    """The class for `recipe` on top of `base`, under base's own name.

    The name stays because transformers, accelerate and FSDP policies match classes by it.
    """
    made = _MADE.get((base, recipe))
    if made is None:
        bases = recipe.bases(base)
        namespace = {
            **recipe.namespace(base),
            "__module__": __package__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": _reduce_ex,
            "_fastllm_base": base,
            "_fastllm_recipe": recipe,
        }
        made = type(bases[0])(base.__name__, bases, namespace)
        _MADE[(base, recipe)] = made
    return made


def recipe_of(module: nn.Module) -> Recipe | None:
    """The recipe of a swapped module, also when its class was derived from again (FSDP does)."""
    return getattr(type(module), "_fastllm_recipe", None)


def original(module: nn.Module) -> type:
    """The class a module had before it was swapped."""
    return vars(type(module)).get("_fastllm_base", type(module))


def made(cls: type) -> bool:
    """Whether `cls` itself, not an ancestor, was made here."""
    return "_fastllm_recipe" in vars(cls)


def unfit(module: nn.Module) -> str | None:
    """Why the class of this module must not be changed, or None."""
    cls = original(module)
    if any(getattr(cls, n) is not getattr(object, n) for n in ("__reduce_ex__", "__reduce__")):
        return "its class defines its own pickling"
    forward = vars(module).get("forward")
    if forward is not None and not _wrapped_by_accelerate(module):
        return "its forward was overridden on the instance"
    return None


def _wrapped_by_accelerate(module: nn.Module) -> bool:
    """Accelerate's hooks keep the class's own forward as the instance's `_old_forward`."""
    inner = vars(module).get("_old_forward")
    return "_hf_hook" in vars(module) and is_bound(inner, module, type(module).forward)


def _rebuild(base: type, recipe: Recipe) -> Any:
    return object.__new__(make(base, recipe))


def _reduce_ex(self: Any, protocol: int) -> tuple:
    reduced: Any = object.__reduce_ex__(self, max(protocol, 2))
    cls: Any = type(self)
    if not made(cls):  # a class derived from ours has to pickle itself
        return reduced
    state = reduced[2:]
    return (_rebuild, (cls._fastllm_base, cls._fastllm_recipe), *state)
