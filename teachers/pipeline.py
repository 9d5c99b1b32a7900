"""The teacher as a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from teachers.condition import Condition
from teachers.guidance import GuidedDenoiser, guide
from teachers.halton_network import HaltonMaskGITTransformer
from teachers.network import MaskGITTransformer
from teachers.randomness import Generators
from teachers.samplers.sampler import Sampler
from teachers.tokenizer import PatchTokenizer
from teachers.vq import VQTokenizer

Denoiser = MaskGITTransformer | HaltonMaskGITTransformer
ImageTokenizer = PatchTokenizer | VQTokenizer

OUTPUT_TYPES = ("pil", "pt", "np", "tokens")


@dataclass
class MaskedDiffusionOutput(BaseOutput):
    """The images, the tokens (B, L) they were decoded from, and the network evaluations per image (the mean).

    With `output_type="tokens"` nothing is decoded and `images` are the tokens.
    """

    images: list[PIL.Image.Image] | torch.Tensor | np.ndarray
    tokens: torch.Tensor
    nfe: float


class TokenPipeline(DiffusionPipeline):
    """What teacher and student share: a denoiser over the tokens of an image tokenizer."""

    denoiser: Denoiser
    tokenizer: ImageTokenizer

    @property
    def mask_token_id(self) -> int:
        return self.denoiser.mask_token_id

    @property
    def codebook_size(self) -> int:
        return self.denoiser.config.codebook_size

    @property
    def num_classes(self) -> int:
        return self.denoiser.config.num_classes

    @property
    def token_grid(self) -> tuple[int, int]:
        return tuple(self.denoiser.config.token_grid)

    @property
    def sequence_length(self) -> int:
        return self.token_grid[0] * self.token_grid[1]

    def encode_condition(self, class_labels: Sequence[int] | torch.Tensor | int) -> Condition:
        """The condition of class labels, each in 0 .. num_classes - 1."""
        if isinstance(class_labels, int):
            class_labels = [class_labels]
        if any(isinstance(label, str) for label in class_labels):
            raise ValueError("got prompts, but this model is conditioned on class labels; pass integers")
        labels = torch.as_tensor(class_labels)
        if labels.numel() == 0 or labels.is_floating_point() or labels.dim() != 1:
            raise ValueError(f"class labels must be a non-empty list of integers, got {class_labels!r}")
        outside = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(outside):
            raise ValueError(
                f"class label {outside[0].item()} is out of range: this model knows 0 to {self.num_classes - 1}"
            )
        return Condition(labels.long().to(self.device))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1] -> tokens (B, L)."""
        return self.tokenizer.encode(images.to(self.device))

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) -> images (B, C, H, W) in [0, 1]."""
        return self.tokenizer.decode(tokens)

    def _output(self, tokens: torch.Tensor, nfe: float, output_type: str, return_dict: bool):
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} is not known; choose from {', '.join(OUTPUT_TYPES)}")
        images = tokens if output_type == "tokens" else self.decode(tokens)
        if output_type in ("pil", "np"):
            images = images.permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        if not return_dict:
            return (images,)
        return MaskedDiffusionOutput(images=images, tokens=tokens, nfe=nfe)


class MaskedDiffusionPipeline(TokenPipeline):
    """A masked diffusion model that generates in several steps: `pipe(class_labels=[3, 7]).images`.

    The settings are the defaults for drawing tokens, saved with the pipeline: `guidance_scale` s in u + s (c - u),
    `guidance_ramp` ("constant", or "linear" from no guidance at the first step), `temperature`, `top_k`, `top_p`.
    """

    sampler: Sampler

    def __init__(
        self,
        denoiser: Denoiser,
        tokenizer: ImageTokenizer,
        sampler: Sampler,
        guidance_scale: float = 1.0,
        guidance_ramp: str = "constant",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ):
        super().__init__()
        self.register_modules(denoiser=denoiser, tokenizer=tokenizer, sampler=sampler)
        self.register_to_config(
            guidance_scale=guidance_scale,
            guidance_ramp=guidance_ramp,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )

    def denoise(self, tokens: torch.Tensor, condition: Condition, guidance_scale: float = 1.0) -> torch.Tensor:
        """Guided logits u + s (c - u) (B, L, V) for tokens (B, L)."""
        return guide(self.denoiser, tokens, condition, guidance_scale)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | torch.Tensor | int,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> MaskedDiffusionOutput | tuple:
        """Generate one image per class label.

        What is not given is the default of the sampler (`pipe.sampler.config`) or the pipeline (`pipe.config`). A list
        of generators, one per image, makes each image independent of the batch that it is made in.
        """
        config = self.config
        condition = self.encode_condition(class_labels)
        denoise = GuidedDenoiser(
            self.denoiser,
            condition,
            config.guidance_scale if guidance_scale is None else guidance_scale,
            config.guidance_ramp,
            temperature=config.temperature if temperature is None else temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        )
        tokens = torch.full((len(condition), self.sequence_length), self.mask_token_id, device=self.device)
        tokens = self.sampler(denoise, tokens, num_inference_steps=num_inference_steps, generator=generator)
        return self._output(tokens, denoise.nfe.double().mean().item(), output_type, return_dict)
