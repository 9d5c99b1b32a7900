"""The generalised Jeffreys divergence between token distributions, and its gradient.

Eqs. 8 and 16 of Di[M]O (arXiv 2503.15457). Shapes: B batch, L tokens, M masked tokens of the batch, V codebook size.
"""

from __future__ import annotations

from typing import Any

import torch

CPU_CHUNK, GPU_CHUNK = 2**18, 2**24  # numbers worked on at a time: they stay in the caches of the one, fill the other


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def jeffreys_divergence(teacher_logits: torch.Tensor, auxiliary_logits: torch.Tensor, beta: float) -> torch.Tensor:
    """(1 - b) KL(teacher || auxiliary) + b KL(auxiliary || teacher) per token (...) of logits (..., V), in nats.

    b = 0 is the forward KL divergence, b = 1 the reverse; any real b will do.
    """
    log_t, log_a = _log_probabilities(teacher_logits), _log_probabilities(auxiliary_logits)
    forward = (log_t.exp() * (log_t - log_a)).sum(-1)
    reverse = (log_a.exp() * (log_a - log_t)).sum(-1)
    return (1 - beta) * forward + beta * reverse


def _gradient(teacher: torch.Tensor, auxiliary: torch.Tensor, beta: float) -> torch.Tensor:
    log_t, log_a = _log_probabilities(teacher), _log_probabilities(auxiliary)
    p_a = log_a.exp()
    gradient = p_a - log_t.exp()
    if beta != 0:
        log_ratio = log_a.sub_(log_t)
        reverse = p_a.mul_(log_ratio - (p_a * log_ratio).sum(-1, keepdim=True))
        gradient.mul_(1 - beta).add_(reverse, alpha=beta)
    return gradient


_compiled_gradient = torch.compile(_gradient, dynamic=True)


@torch.no_grad()
def divergence_gradient(
    teacher_logits: torch.Tensor,
    auxiliary_logits: torch.Tensor,
    beta: float = 0.0,
    out: torch.Tensor | None = None,
    compiled: bool = False,
) -> torch.Tensor:
    """The gradient (M, V) of the Jeffreys divergence with respect to the auxiliary's logits (M, V).

    (1 - b) (p_a - p_t) + b p_a (log p_a - log p_t - KL(a || t)), Eq. 16, worked out in float32, some rows at a time,
    and written to `out`, which may be the teacher's logits. `compiled` has torch.compile fuse the work on those rows.
    """
    # What is compiled writes to none of its inputs: these may be views of one memory, which torch.compile gets wrong.
    gradient = torch.empty_like(auxiliary_logits) if out is None else out
    chunk = CPU_CHUNK if gradient.device.type == "cpu" else GPU_CHUNK
    num_rows = max(1, chunk // gradient.shape[-1])
    gradient_of = _compiled_gradient if compiled else _gradient
    chunks = zip(*(part.split(num_rows) for part in (teacher_logits, auxiliary_logits, gradient)), strict=True)
    for teacher, auxiliary, result in chunks:
        result.copy_(gradient_of(teacher, auxiliary, beta))
    return gradient


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, positions: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(positions, gradient)
        ctx.like = logits.shape, logits.dtype
        return gradient.new_zeros(())

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        positions, gradient = ctx.saved_tensors
        shape, dtype = ctx.like
        whole = torch.zeros(shape, dtype=dtype, device=gradient.device)
        gradient.mul_(scale)  # in place, for a graph is gone through once; before float16 makes zeros of what is small
        whole.flatten(0, 1)[positions] = gradient.to(dtype)
        return whole, None, None


def with_gradient(logits: torch.Tensor, positions: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A scalar, 0, whose gradient with respect to logits (B, L, V) is `gradient` (M, V) at positions (M,), b L + l."""
    return _WithGradient.apply(logits, positions, gradient)
