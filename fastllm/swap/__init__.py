"""fastllm.swap(model): fast modules put into this model in place, provably and reversibly.

    handle = fastllm.swap(model, verify=inputs)
    print(handle.report())
    handle.restore()

A swap changes the class of a module instance to a subclass of its own class and nothing else:
parameters, buffers, hooks, tied weights, optimizers, device maps and wrappers keep seeing the
very same objects.

rules.py     what matches -> what replaces it: norms, linears, embeddings, activations
probe.py     which norm a module computes, found out by running it; activations.py and linears.py
             do the same for theirs
blocks.py    what is fused in a module together with its children:
             rewrite.py  residual additions into the norm that follows them
             mlp.py      the activation of a feed-forward block into the products around it
             attention.py  the attention function of Hugging Face models
             rotary.py   the rotation of queries and keys
fused_loss.py  the loss of a causal LM behind labels=, with lazy.py's logits
verify.py    the proof on the user's own input
unpad.py     unpad=True: encoder layers without padding
tuning.py    fastllm.tune: what a model really calls, measured
winners.py   tune=True: replaced modules timed in place, only winners kept
handle.py    the order of it all, and the way back
"""

import sys
import types
from typing import Any

from fastllm.swap.engine import swap_model
from fastllm.swap.handle import Handle, restore
from fastllm.swap.report import Report, Row

__all__ = ["Handle", "Report", "Row", "restore", "swap"]


class _Callable(types.ModuleType):
    """The package is the function, too: `fastllm.swap(model)` and `fastllm.swap.rules` work."""

    def __call__(
        self,
        model: Any,
        include: Any = None,
        exclude: Any = None,
        verify: Any = None,
        backend: str | None = None,
        example_inputs: Any = None,
        tune: bool = False,
        fused_loss: bool = False,
        unpad: bool = False,
    ) -> Handle:
        return swap_model(
            model, include, exclude, verify, backend, example_inputs, tune, fused_loss, unpad
        )


_Callable.__call__.__doc__ = swap_model.__doc__
swap = sys.modules[__name__]
swap.__class__ = _Callable
