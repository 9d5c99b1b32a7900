"""The generalised Jeffreys divergence between token distributions, and its gradient.

Eqs. 8 and 16 of Di[M]O (arXiv 2503.15457). Shapes: B batch, L tokens, V codebook size.
"""

import torch


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def jeffreys_divergence(teacher_logits: torch.Tensor, auxiliary_logits: torch.Tensor, beta: float) -> torch.Tensor:
    """(1 - b) KL(teacher || auxiliary) + b KL(auxiliary || teacher) per token (B, L), in nats.

    b = 0 is the forward KL divergence, b = 1 the reverse; any real b will do.
    """
    log_t, log_a = _log_probabilities(teacher_logits), _log_probabilities(auxiliary_logits)
    forward = (log_t.exp() * (log_t - log_a)).sum(-1)
    reverse = (log_a.exp() * (log_a - log_t)).sum(-1)
    return (1 - beta) * forward + beta * reverse


@torch.no_grad()
def divergence_gradient(
    teacher_logits: torch.Tensor, auxiliary_logits: torch.Tensor, mask: torch.Tensor, beta: float = 0.0
) -> torch.Tensor:
    """The gradient (B, L, V) of the Jeffreys divergence with respect to the auxiliary's logits; zero off the mask.

    (1 - b) (p_a - p_t) + b p_a (log p_a - log p_t - KL(a || t)), Eq. 16.
    """
    log_t, log_a = _log_probabilities(teacher_logits), _log_probabilities(auxiliary_logits)
    p_t, p_a = log_t.exp(), log_a.exp()
    gradient = (1 - beta) * (p_a - p_t)
    if beta != 0:
        log_ratio = log_a - log_t
        gradient = gradient + beta * p_a * (log_ratio - (p_a * log_ratio).sum(-1, keepdim=True))
    return gradient * mask[..., None]


def with_gradient(logits: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A scalar whose gradient with respect to the logits is `gradient`; its value means nothing."""
    return (logits * gradient.detach()).sum()
