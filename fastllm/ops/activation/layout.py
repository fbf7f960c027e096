"""Tensors as rows that are evenly spaced in memory, which kernels read without a copy."""

from torch import Tensor


def row_step(tensor: Tensor) -> int | None:
    """Elements from one row (last dimension) to the next; None where rows need a copy first."""
    shape, strides = tensor.shape, tensor.stride()
    if strides[-1] != 1 and shape[-1] != 1:
        return None
    step, reach = None, 0
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if size == 1:
            continue
        if step is None:
            step = reach = stride
        elif stride != reach:
            return None
        reach *= size
    return shape[-1] if step is None else step


def as_rows(*tensors: Tensor) -> tuple[list[Tensor], int, int, list[int]]:
    """(tensors, rows, cols, row strides) of tensors of one shape; copies only what is not even.

    Contiguous tensors are one long row. Halves of a fused projection stay where they are.
    """
    if all(t.is_contiguous() for t in tensors):
        size = tensors[0].numel()
        return list(tensors), 1, size, [size] * len(tensors)
    cols = tensors[0].shape[-1]
    rows = tensors[0].numel() // cols if cols else 0
    made, steps = [], []
    for tensor in tensors:
        step = row_step(tensor)
        made.append(tensor.contiguous() if step is None else tensor)
        steps.append(cols if step is None else step)
    return made, rows, cols, steps
