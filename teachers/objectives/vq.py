"""The objective of VQ tokenizers. Shapes: B batch, L tokens, V codebook size, E size of an entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from teachers.objectives.objective import Objective
from teachers.randomness import derive_seed
from teachers.tokenizers.vq import VQTokenizer, codebook_use


@dataclass
class VQConfig:
    """What a VQ tokenizer learns."""

    reconstruction_weight: float = field(
        default=10.0, metadata={"help": "of the mean squared error, against the codebook's"}
    )
    commitment_weight: float = field(default=0.25, metadata={"help": "how much latents are drawn to their entries"})
    revival_rate: float = field(
        default=0.02,
        metadata={"help": "probability that an entry without use in a batch is moved to where there is"},
    )
    revival_share: float = field(default=0.7, metadata={"help": "share of the training in which entries are moved"})
    lowest_perplexity: float = field(
        default=0.1, metadata={"help": "share of the codebook size below which training stops half-way"}
    )

    def __post_init__(self) -> None:
        for name in ("revival_rate", "revival_share", "lowest_perplexity"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"objective.{name}={getattr(self, name)} must be in [0, 1]")


class VQObjective(Objective):
    """Training of a VQ-VAE (arXiv 1711.00937): reconstruction, codebook and commitment, all mean squares.

    In the first share of the `num_steps` steps an entry that no latent of the batch chose is moved, with probability
    `revival_rate`, to a random latent of that batch, so that none stays dead; in the very first step all of them are.

    The batch is (images (B, C, H, W), step). `gather` collects tensors of all processes, so that all of them move the
    same entries to the same latents.
    """

    config_class = VQConfig
    averaged, updates = "tokenizer", (("tokenizer",),)

    def __init__(
        self,
        config: VQConfig,
        tokenizer: VQTokenizer,
        num_steps: int = 0,
        seed: int = 0,
        gather: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    ):
        self.config, self.tokenizer, self.seed, self.gather = config, tokenizer, seed, gather
        self.networks = {"tokenizer": tokenizer}
        self.num_revival_steps = int(config.revival_share * num_steps)

    def losses(
        self,
        networks: dict[str, nn.Module],
        update: tuple[str, ...],
        batch: tuple[torch.Tensor, int],
        generators: list[torch.Generator],
        measured: bool = False,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The loss of the tokenizer, and if measured its mean squared error, use and perplexity of the codebook."""
        images, step = batch
        reconstructed, latents, entries, tokens = networks["tokenizer"](images)
        error = F.mse_loss(reconstructed, images)
        codebook_loss = F.mse_loss(entries, latents.detach())
        commitment_loss = F.mse_loss(latents, entries.detach())
        config = self.config
        loss = config.reconstruction_weight * error + codebook_loss + config.commitment_weight * commitment_loss

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
        rate = self.config.revival_rate if step else 1.0
        chosen = (unused & (torch.rand(len(codebook), generator=draw) < rate)).nonzero().squeeze(1)
        candidates = latents.flatten(0, 1)
        sources = torch.randint(len(candidates), (len(chosen),), generator=draw)
        codebook[chosen.to(codebook.device)] = candidates[sources.to(candidates.device)]
