"""Layers of a model become QuantLinear in place, and what they were again."""

from typing import Any

from torch import Tensor, nn

from fastllm.core.instances import assign
from fastllm.quant.linear import CODES, QuantLinear, fill
from fastllm.quant.qtensor import QTensor


class Original:
    """What a module was before it became a QuantLinear."""

    def __init__(self, module: nn.Module) -> None:
        self.cls = type(module)
        self.parameters = dict(module._parameters)
        self.attributes = set(vars(module))

    def put_back(self, module: Any) -> None:
        """Gives the module its class and parameters back; the bias may have been trained."""
        for name in (*CODES, "_like"):
            module._buffers.pop(name, None)
            module._non_persistent_buffers_set.discard(name)
        for name in set(vars(module)) - self.attributes:
            del vars(module)[name]
        assign(module, self.cls)
        module._parameters.clear()
        module._parameters.update(self.parameters)


def adopt(module: Any, q: QTensor, activations: str = "float", **scales: Tensor | None) -> Original:
    """Makes a Linear (or Conv1D) a QuantLinear in place: hooks, owners and paths stay.

    scales: what `fill` takes beside the codes. Returns the way back.
    """
    before = Original(module)
    weight = module._parameters["weight"]
    transposed = not isinstance(module, nn.Linear)
    del module._parameters["weight"]
    try:
        fill(module, q, activations, **scales, like=weight, transposed=transposed)
        module.out_features, module.in_features = q.shape
        assign(module, QuantLinear)
    except BaseException:
        before.put_back(module)
        raise
    return before
