"""A table of token probabilities, small enough to be kept beside a student whatever the codebook's size.

Shapes: C classes, B batch, L tokens, V codebook size, K tokens that are kept.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

MAX_TABLE = 2**25  # classes x positions x kept tokens: 192 MiB, as they are held


class MarginalTable(nn.Module):
    """The probabilities of the tokens at each position, for each class or without classes (C = 0).

    Of each class and position the K most probable tokens are known, K = V where C L V is at most `MAX_TABLE`; what else
    there may be is drawn from the mean, over classes, of all that was not kept. So with K < V the probabilities of the
    K are exact but for what that mean adds to them.

    Sums of probabilities are held as the bits of float32, in integers, because `to(dtype)` and `torch_dtype` cast what
    is a floating-point number: sums of thousands of probabilities in half precision are no distribution.
    """

    def __init__(self, num_classes: int, length: int, codebook_size: int):
        super().__init__()
        self.num_kept = min(codebook_size, MAX_TABLE // (num_classes * length)) if num_classes else 0
        self.is_whole = self.num_kept == codebook_size
        rest = 0 if self.is_whole else codebook_size
        token_type = torch.int16 if codebook_size <= 2**15 else torch.int32
        kept = (num_classes, length, self.num_kept)
        self.register_buffer("kept_tokens", torch.zeros(kept, dtype=token_type))
        self.register_buffer("kept_bits", torch.zeros(kept, dtype=torch.int32))
        self.register_buffer("rest_bits", torch.zeros((length, rest), dtype=torch.int32))

    @torch.no_grad()
    def fill(self, probabilities: Iterable[torch.Tensor]) -> None:
        """From the probabilities (c, L, V) of some classes after others; without classes, from any, for their mean."""
        rest: torch.Tensor | float = 0.0
        first = 0
        for part in probabilities:
            rows = slice(first, first := first + len(part))
            if self.num_kept:
                tokens = part.topk(self.num_kept).indices.sort(-1).values
                self.kept_tokens[rows] = tokens.to(self.kept_tokens)
                self.kept_bits[rows] = _bits(part.gather(-1, tokens).cumsum(-1)).to(self.kept_bits)
                part = part.scatter(-1, tokens, 0)
            if not self.is_whole:
                rest = rest + part.sum(0)
        if not self.is_whole:
            self.rest_bits.copy_(_bits((rest / first).cumsum(-1)))

    def fill_from_sums(self, cumulative: torch.Tensor) -> None:
        """From the whole table (C, L, V), or (1, L, V) without classes, of sums along V."""
        if self.is_whole:
            self.kept_tokens.copy_(torch.arange(cumulative.shape[-1]).expand_as(cumulative))
            self.kept_bits.copy_(_bits(cumulative))
        elif self.num_kept == 0:
            self.rest_bits.copy_(_bits(cumulative[0]))
        else:
            self.fill(part.diff(dim=-1, prepend=torch.zeros_like(part[..., :1])) for part in cumulative.split(64))

    def forward(self, class_labels: torch.Tensor | None, uniform: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) at which uniform numbers (B, L) in [0, 1) fall; labels (B,) where there are classes."""
        if self.num_kept == 0:
            return self._of_the_rest(uniform)
        sums = self.kept_bits[class_labels].view(torch.float32)
        last = sums[..., -1]
        total = last if self.is_whole else torch.ones_like(last)
        index = torch.searchsorted(sums, (uniform * total)[..., None], right=True)
        kept = index.clamp(max=self.num_kept - 1)
        tokens = self.kept_tokens[class_labels].gather(-1, kept).squeeze(-1).long()
        if self.is_whole:
            return tokens
        beyond = ((uniform - last) / (1 - last).clamp(min=1e-7)).clamp(0, 1 - 2**-24)
        return torch.where(index.squeeze(-1) < self.num_kept, tokens, self._of_the_rest(beyond))

    def _of_the_rest(self, uniform: torch.Tensor) -> torch.Tensor:
        sums = self.rest_bits.view(torch.float32)
        by_position = uniform.T.contiguous() * sums[:, -1:]  # all samples share the probabilities of a position
        return torch.searchsorted(sums, by_position, right=True).clamp(max=sums.shape[-1] - 1).T


def _bits(sums: torch.Tensor) -> torch.Tensor:
    return sums.float().contiguous().view(torch.int32)
