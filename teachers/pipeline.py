"""The teacher as a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import PIL.Image
import torch
from diffusers import ModelMixin
from diffusers.utils import BaseOutput
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from teachers.conditions.condition import ClassCondition, ClassLabels, Condition, TextCondition
from teachers.conditions.prompts import encode_prompts, micro_conditions
from teachers.data import NO_CLASS
from teachers.denoiser import ConditionKind, Denoiser, check_denoiser
from teachers.guidance import GuidedDenoiser, check_guidance, guide
from teachers.opening import SavedPipeline
from teachers.randomness import Generators
from teachers.released.published import is_published, published_components
from teachers.samplers.sampler import Sampler
from teachers.tokenizers.patch import PatchTokenizer
from teachers.tokenizers.vq import VQTokenizer

ImageTokenizer = PatchTokenizer | VQTokenizer

OUTPUT_TYPES = ("pil", "pt", "np", "tokens")
MAX_LOGITS = 2**27  # of a piece of a batch: half a GiB in float32, of which there are a few at a time


@dataclass
class MaskedDiffusionOutput(BaseOutput):
    """The images, the tokens (B, L) they were decoded from, and the network evaluations per image (the mean).

    With `output_type="tokens"` nothing is decoded and `images` are the tokens.
    """

    images: list[PIL.Image.Image] | torch.Tensor | np.ndarray
    tokens: torch.Tensor
    nfe: float


class TokenPipeline(SavedPipeline):
    """What teacher and student share: a denoiser over the tokens of an image tokenizer.

    A denoiser conditioned on text has a text encoder and its tokenizer beside it; they may be left out (None) where all
    conditions come encoded.
    """

    _optional_components: ClassVar = ["text_encoder", "text_tokenizer"]

    denoiser: Denoiser
    tokenizer: ImageTokenizer
    text_encoder: CLIPTextModelWithProjection | None
    text_tokenizer: CLIPTokenizer | None

    @property
    def mask_token_id(self) -> int:
        return self.denoiser.mask_token_id

    @property
    def codebook_size(self) -> int:
        return self.tokenizer.codebook_size

    @property
    def condition_kind(self) -> ConditionKind:
        """The denoiser's: "classes", "text" or "none"."""
        return self.denoiser.condition_kind

    @property
    def num_classes(self) -> int:
        return self.denoiser.config.num_classes

    @property
    def token_grid(self) -> tuple[int, int]:
        return tuple(self.denoiser.config.token_grid)

    @property
    def sequence_length(self) -> int:
        return self.token_grid[0] * self.token_grid[1]

    def encode_condition(
        self,
        conditions: Sequence[int] | Sequence[str] | Sequence[None] | torch.Tensor | int | str,
        negative_prompt: str | None = None,
    ) -> Condition:
        """The condition of prompts, of class labels, each in 0 .. num_classes - 1, or of as many times None.

        The negative prompt (default: `pipe.config.negative_prompt`) is what guidance leads away from.
        """
        if isinstance(conditions, int | str):
            conditions = [conditions]
        if self.condition_kind == "text":
            return self._encode_prompts(list(conditions), negative_prompt)
        if negative_prompt is not None:
            raise ValueError("got a negative prompt, but this model is not conditioned on text")
        if self.condition_kind == "none":
            if any(condition is not None for condition in conditions):
                raise ValueError(
                    "this model is unconditional: it takes neither class labels nor prompts, only batch_size"
                )
            return ClassCondition.none(len(conditions), self.device)
        if any(isinstance(label, str) for label in conditions):
            raise ValueError("got prompts, but this model is conditioned on class labels; pass integers")
        labels = torch.as_tensor(conditions)
        if labels.numel() == 0 or labels.is_floating_point() or labels.dim() != 1:
            raise ValueError(f"class labels must be a non-empty list of integers, got {conditions!r}")
        outside = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(outside):
            raise ValueError(
                f"class label {outside[0].item()} is out of range: this model knows 0 to {self.num_classes - 1}"
            )
        return ClassCondition(labels.long().to(self.device))

    def _encode_prompts(self, prompts: list[str], negative_prompt: str | None) -> TextCondition:
        if self.text_encoder is None or self.text_tokenizer is None:
            raise ValueError("this pipeline was opened without its text encoder; pass an encoded `condition`")
        if not prompts:
            raise ValueError("got an empty list of prompts")
        micro = micro_conditions(self.tokenizer.config.image_size, len(prompts), self.device)
        negative_prompt = self.config.get("negative_prompt") if negative_prompt is None else negative_prompt
        if negative_prompt is None:  # a one-step student knows none
            return TextCondition(*encode_prompts(self.text_encoder, self.text_tokenizer, prompts), micro)
        states, pooled = encode_prompts(self.text_encoder, self.text_tokenizer, [*prompts, negative_prompt])
        null = states[-1:].expand(len(prompts), -1, -1), pooled[-1:].expand(len(prompts), -1)
        return TextCondition(states[:-1], pooled[:-1], micro, *null)

    def _condition(
        self,
        prompt: Any,
        class_labels: Any,
        condition: Condition | None,
        batch_size: int | None,
        negative_prompt: str | None = None,
    ) -> Condition:
        """The one of the three that was given (the first may be class labels too), or none, so many times."""
        given = [kind for kind in (prompt, class_labels, condition) if kind is not None]
        if self.condition_kind == "none" and not given:
            batch_size = 1 if batch_size is None else batch_size
            if batch_size < 1 or negative_prompt is not None:
                raise ValueError(
                    f"got batch_size={batch_size} and negative_prompt={negative_prompt!r}; an unconditional model "
                    "makes one image or more, and takes no prompt"
                )
            return ClassCondition.none(batch_size, self.device)
        if len(given) != 1 or batch_size is not None:
            raise ValueError("pass one of prompt, class_labels and condition; batch_size is of unconditional models")
        if isinstance(given[0], Condition):
            return given[0].to(self.device)
        return self.encode_condition(given[0], negative_prompt)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1] -> tokens (B, L)."""
        return self.tokenizer.encode(images.to(self.device))

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) -> images (B, C, H, W) in [0, 1]."""
        return self.tokenizer.decode(tokens)

    def _pieces(self, condition: Condition, generator: Generators) -> Iterator[tuple[Condition, Generators]]:
        """A batch in pieces whose logits fit into memory, with their generators."""
        if isinstance(generator, list) and len(generator) != len(condition):
            raise ValueError(
                f"got {len(generator)} generators for a batch of {len(condition)}; pass one per sample or one"
            )
        size = max(1, MAX_LOGITS // (self.sequence_length * self.codebook_size))
        for start in range(0, len(condition), size):
            rows = slice(start, start + size)
            yield condition.select(rows), generator[rows] if isinstance(generator, list) else generator

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


def all_classes(pipeline: TokenPipeline) -> ClassLabels:
    """The classes that the pipeline knows, in order; of an unconditional one the single entry `NO_CLASS`."""
    if pipeline.condition_kind == "none":
        return ClassLabels(torch.tensor([NO_CLASS]))
    if pipeline.condition_kind == "text":
        raise ValueError("this model is conditioned on text: it has no classes to go through; name prompts")
    return ClassLabels(torch.arange(pipeline.num_classes))


class MaskedDiffusionPipeline(TokenPipeline):
    """A masked diffusion model that generates in several steps: `pipe(class_labels=[3, 7]).images`, or, where it is
    conditioned on text, `pipe("a red apple").images`, or, where it is unconditional, `pipe(batch_size=4).images`.

    The settings are the defaults for drawing tokens, saved with the pipeline: `guidance_scale` s in u + s (c - u),
    `guidance_ramp` ("constant", or "linear" from no guidance at the first step), `temperature`, `top_k`, `top_p`, and
    the `negative_prompt` that guidance leads away from.

    `from_pretrained` also opens aMUSEd, Meissonic and Monetico as they were published, with the settings of
    `published_components`.
    """

    sampler: Sampler

    def __init__(
        self,
        denoiser: ModelMixin,
        tokenizer: ImageTokenizer,
        sampler: Sampler,
        text_encoder: CLIPTextModelWithProjection | None = None,
        text_tokenizer: CLIPTokenizer | None = None,
        guidance_scale: float = 1.0,
        guidance_ramp: str = "constant",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        negative_prompt: str = "",
    ):
        super().__init__()
        check_denoiser(denoiser)
        self.register_modules(
            denoiser=denoiser,
            tokenizer=tokenizer,
            sampler=sampler,
            text_encoder=text_encoder,
            text_tokenizer=text_tokenizer,
        )
        self.register_to_config(
            guidance_scale=guidance_scale,
            guidance_ramp=guidance_ramp,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            negative_prompt=negative_prompt,
        )

    @classmethod
    def _open(cls, name: str | Path, **settings) -> Self:
        if is_published(name):
            return cls(**published_components(name, **settings))
        return super()._open(name, **settings)

    def denoise(self, tokens: torch.Tensor, condition: Condition, guidance_scale: float = 1.0) -> torch.Tensor:
        """Guided logits u + s (c - u) (B, L, V) for tokens (B, L)."""
        check_guidance(self.denoiser, guidance_scale)
        return guide(self.denoiser, tokens, condition, guidance_scale)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Sequence[str] | str | None = None,
        class_labels: Sequence[int] | torch.Tensor | int | None = None,
        *,
        condition: Condition | None = None,
        batch_size: int | None = None,
        negative_prompt: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> MaskedDiffusionOutput | tuple:
        """Generate one image per prompt or class label, or per row of a `condition` that `encode_condition` gave; or
        `batch_size` images (default 1) of an unconditional model.

        What is not given is the default of the sampler (`pipe.sampler.config`) or the pipeline (`pipe.config`). A list
        of generators, one per image, makes each image independent of the batch that it is made in.
        """
        config = self.config
        condition = self._condition(prompt, class_labels, condition, batch_size, negative_prompt)
        guidance_scale = config.guidance_scale if guidance_scale is None else guidance_scale
        check_guidance(self.denoiser, guidance_scale)
        tokens, evaluations = [], 0
        for piece, generators in self._pieces(condition, generator):
            denoise = GuidedDenoiser(
                self.denoiser,
                piece,
                guidance_scale,
                config.guidance_ramp,
                temperature=config.temperature if temperature is None else temperature,
                top_k=config.top_k,
                top_p=config.top_p,
            )
            masks = torch.full((len(piece), self.sequence_length), self.mask_token_id, device=self.device)
            tokens.append(self.sampler(denoise, masks, num_inference_steps=num_inference_steps, generator=generators))
            evaluations += int(denoise.nfe.sum())
        return self._output(torch.cat(tokens), evaluations / len(condition), output_type, return_dict)
