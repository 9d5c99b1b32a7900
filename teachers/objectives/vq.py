"""The training objective of VQ tokenizers. Shapes: B batch, L tokens, V codebook size, E size of an entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from teachers.randomness import derive_seed
from teachers.tokenizers.vq import VQTokenizer


@torch.no_grad()
def codebook_use(tokens: torch.Tensor, codebook_size: int) -> tuple[float, float]:
    """The share of the codebook that occurs among the tokens, and the perplexity exp(entropy) of their distribution."""
    probability = tokens.flatten().bincount(minlength=codebook_size).double() / tokens.numel()
    perplexity = torch.special.entr(probability).sum().exp()
    return (probability > 0).double().mean().item(), perplexity.item()


@dataclass(frozen=True)
class VQObjective:
    """Training of a VQ-VAE (arXiv 1711.00937): reconstruction, codebook and commitment, all mean squares.

    In the first `num_revival_steps` steps an entry that no latent of the batch chose is moved, with probability
    `revival_rate`, to a random latent of that batch, so that none stays dead; in the very first step all of them are.

    The batch is (images (B, C, H, W), step). `gather` collects tensors of all processes, so that all of them move the
    same entries to the same latents.
    """

    tokenizer: VQTokenizer
    reconstruction_weight: float = 10.0
    commitment_weight: float = 0.25
    revival_rate: float = 0.02
    num_revival_steps: int = 0
    seed: int = 0
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor

    updates = (("tokenizer",),)

    def losses(
        self,
        networks: dict[str, nn.Module],
        update: tuple[str, ...],
        batch: tuple[torch.Tensor, int],
        generator: list[torch.Generator],
        measured: bool = False,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The loss of the tokenizer, and if measured its mean squared error, use and perplexity of the codebook."""
        images, step = batch
        reconstructed, latents, entries, tokens = networks["tokenizer"](images)
        error = F.mse_loss(reconstructed, images)
        codebook_loss = F.mse_loss(entries, latents.detach())
        commitment_loss = F.mse_loss(latents, entries.detach())
        loss = self.reconstruction_weight * error + codebook_loss + self.commitment_weight * commitment_loss

        tokens = self.gather(tokens)
        if step < self.num_revival_steps:
            self._revive(tokens, self.gather(latents.detach()), step)
        metrics = {}
        if measured:
            used, perplexity = codebook_use(tokens, self.tokenizer.codebook_size)
            metrics = {"error": error, "used": error.new_tensor(used), "perplexity": error.new_tensor(perplexity)}
        return {"tokenizer": loss}, {name: value.to(images.device) for name, value in metrics.items()}

    @torch.no_grad()
    def _revive(self, tokens: torch.Tensor, latents: torch.Tensor, step: int) -> None:
        codebook = self.tokenizer.codebook
        draw = torch.Generator().manual_seed(derive_seed(self.seed, "revive", step))
        unused = tokens.flatten().bincount(minlength=len(codebook)).cpu() == 0
        rate = self.revival_rate if step else 1.0
        chosen = (unused & (torch.rand(len(codebook), generator=draw) < rate)).nonzero().squeeze(1)
        candidates = latents.flatten(0, 1)
        places = torch.randint(len(candidates), (len(chosen),), generator=draw)
        codebook[chosen.to(codebook.device)] = candidates[places.to(candidates.device)]
