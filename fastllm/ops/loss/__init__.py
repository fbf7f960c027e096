"""cross_entropy and distillation losses over logits: fused forward and backward."""

from typing import Any

import torch
from torch import Tensor

from fastllm.core.dispatch import define
from fastllm.core.op import Op
from fastllm.ops.loss import cpu, reference, spec, stock, triton
from fastllm.ops.loss.cases import cases


def _register(name: str, **facts: Any) -> Op:
    """The op `name`: what its name settles, and the facts that are its own."""
    backends = (cpu.BACKENDS[name], triton.BACKENDS[name], stock.BACKENDS[name])
    facts.update(family="loss", schema=spec.SCHEMAS[name], cases=cases(name), hidden=1)
    facts["autocast"] = {"cpu": torch.float32, "cuda": torch.float32}
    return define(name, backends, reference, **facts)


def _saved(args: tuple, outputs: tuple) -> tuple:
    """The tensors, the log-sum-exp, the gradient if forward made it, the options."""
    gradient = outputs[2] if len(outputs) > 2 else None
    return (*args[:3], outputs[1], gradient, *args[3:])


def _forward_args(saved: tuple) -> tuple:
    return (*saved[:3], *saved[5:])


cross_entropy_op = _register(
    "cross_entropy",
    tensors=(0, 1, 2),
    saved=_saved,
    saved_tensors=(0, 1, 2, 3),
    forward_args=_forward_args,
    gradients={0: 0},
    check=spec.check_indices,
    fake=spec.fake_cross_entropy,
    fake_backward=spec.fake_indices_backward,
    cost=spec.cost_rows,
)
cross_entropy_probs_op = _register(
    "cross_entropy_probs",
    tensors=(0, 1, 2),
    saved=_saved,
    saved_tensors=(0, 1, 2, 3),
    forward_args=_forward_args,
    gradients={0: 0, 1: 1},
    check=spec.check_probs,
    fake=spec.fake_cross_entropy,
    fake_backward=spec.fake_probs_backward,
    cost=spec.cost_pairs,
)
divergence_op = _register(
    "divergence",
    tensors=(0, 1),
    saved=lambda args, out: (*args[:2], out[1], *args[2:]),
    saved_tensors=(0, 1, 2),
    forward_args=lambda saved: (*saved[:2], *saved[3:]),
    gradients={0: 0},
    check=spec.check_divergence,
    fake=spec.fake_divergence,
    fake_backward=spec.fake_indices_backward,
    cost=spec.cost_pairs,
)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Cross entropy as torch.nn.functional.cross_entropy, and what language models add to it.

    input             [C], [N, C] or [N, C, d1, ...] logits of any float dtype; computed in float32
    target            class indices, int64, of input's shape without C; or probabilities of input's
                      shape and dtype
    weight            [C], a weight for each class; it gets no gradient
    ignore_index      rows with this index count nothing and get a gradient of exact zeros
    reduction         "none", "mean" (over the targets' weights; NaN if all are ignored), "sum"
    label_smoothing   share of the target that is spread over all classes (Szegedy et al. 2015)
    z_loss            adds z_loss * log(sum(exp(logits)))^2 to each row (PaLM 2022)
    softcap           0 (off), or logits become softcap * tanh(logits / softcap) (Gemma 2)
    logit_scale       factor on the logits, before softcap
    inplace_backward  backward writes the gradient into input's memory: input must not be read after
                      it, and must not be a leaf; without effect under torch.compile

    Returns the loss in input's dtype, reduced or of target's shape. Raises ValueError or TypeError
    for arguments that do not fit, IndexError for a class out of range (on a GPU the loss of that
    row is NaN instead: an exception would need a sync).
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    spec.require_float("input", input)
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a Tensor, found {type(target).__name__}")
    if inplace_backward:
        if input.is_leaf and input.requires_grad:
            raise ValueError("inplace_backward: expected an input that is not a leaf, found a leaf")
        inplace_backward = not torch.compiler.is_compiling()
    soft = target.is_floating_point()
    if input.dim() == 2:
        x, shape = input, input.shape[:1]
    else:
        x, shape = rows_of(input)
    if soft:
        if target.shape != input.shape:
            raise ValueError(
                f"target: expected probabilities of input's shape {list(input.shape)}, "
                f"found {list(target.shape)}"
            )
        target = rows_of(target)[0]
    elif target.dim() != 1 or input.dim() != 2:
        if target.shape != shape:
            raise ValueError(
                f"target: expected shape {list(shape)} for input {list(input.shape)}, "
                f"found {list(target.shape)}"
            )
        target = target.reshape(-1)
    if target.dtype == torch.uint8:  # torch takes bytes, too
        target = target.long()
    op = cross_entropy_probs_op if soft else cross_entropy_op
    # one pass less where backward will follow; per-row upstream gradients are not known before
    save_gradient = (
        x.requires_grad
        and reduction != "none"
        and not inplace_backward
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )
    loss = op(
        x, target, weight, ignore_index, reduction, float(label_smoothing), float(z_loss),
        float(softcap), float(logit_scale), inplace_backward, save_gradient, backend=backend,
    )  # fmt: skip
    return loss.reshape(shape) if reduction == "none" and len(shape) != 1 else loss


def rows_of(input: Tensor) -> tuple[Tensor, torch.Size]:
    """([rows, C], the shape of the rows) of [C], [N, C] or [N, C, d1, ...]."""
    if input.dim() == 0:
        raise ValueError("input: expected [C], [N, C] or [N, C, d1, ...], found a scalar")
    if input.dim() == 1:
        return input.unsqueeze(0), torch.Size(())
    last = input if input.dim() == 2 else input.movedim(1, -1)
    return last.reshape(-1, last.shape[-1]), last.shape[:-1]


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    alpha: float = 0.5,
    divergence: str = "forward_kl",
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """alpha T^2 D(softmax(teacher / T), softmax(student / T)) + (1 - alpha) cross entropy.

    The field's convention (Hinton et al. 2015): the divergence is scaled by T^2, so that its
    gradients keep their size as T grows; the cross entropy is taken at temperature 1.

    student_logits  [..., C]; teacher_logits the same, without gradient
    target          [...] class indices, or None: the divergence alone, as if alpha were 1
    divergence      "forward_kl" KL(teacher | student), "reverse_kl" KL(student | teacher), "jsd"
                    (Jensen-Shannon, half and half), "tvd" (total variation, half of sum |p - q|)
    ignore_index    positions with this target count nothing
    reduction       "none", "mean" (over the positions that count), "sum"

    Returns float32 (float64 for float64 logits). Raises ValueError or TypeError for arguments that
    do not fit, IndexError for a class out of range on the CPU.
    """
    spec.require_float("student", student_logits)
    if reduction not in spec.REDUCTIONS:
        raise ValueError(f"reduction: expected one of {spec.REDUCTIONS}, found {reduction!r}")
    shape, classes = student_logits.shape[:-1], student_logits.shape[-1]
    s = student_logits.reshape(-1, classes)
    t = teacher_logits.detach().reshape(-1, teacher_logits.shape[-1])
    losses = divergence_op(s, t, divergence, float(temperature), backend=backend)
    if target is None:
        return reduced(losses * temperature**2, None, reduction, shape)
    target = target.reshape(-1)
    hard = cross_entropy(s, target, ignore_index=ignore_index, reduction="none", backend=backend)
    kept = target != ignore_index
    soft = torch.where(kept, losses, 0) * (alpha * temperature**2)
    return reduced(soft + (1.0 - alpha) * hard, kept, reduction, shape)


def reduced(losses: Tensor, kept: Tensor | None, reduction: str, shape: torch.Size) -> Tensor:
    """Rows' losses, 0 where not kept, as `reduction` says."""
    if reduction == "none":
        return losses.reshape(shape)
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if kept is None else losses.sum() / kept.sum()


def hidden_state_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    kind: str = "mse",
) -> Tensor:
    """Distance of hidden states, mean over the positions that count: "mse" or "cosine" (1 - cos).

    student, teacher [..., H]; mask [...], True where a position counts. Cosine is DistilBERT's
    (Sanh et al. 2019). The teacher gets no gradient.
    """
    if kind not in ("mse", "cosine"):
        raise ValueError(f"kind: expected 'mse' or 'cosine', found {kind!r}")
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher: expected the student's shape {list(student.shape)}, "
            f"found {list(teacher.shape)}"
        )
    teacher = teacher.detach()
    if kind == "mse":
        losses = (student - teacher).square().mean(-1)
    else:
        losses = 1.0 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
    if mask is None:
        return losses.mean()
    return torch.where(mask, losses, 0).sum() / mask.sum()
