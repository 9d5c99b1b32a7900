"""The teacher as a diffusers pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

import numpy as np
import PIL.Image
import torch
from diffusers import ModelMixin
from diffusers.utils import BaseOutput
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from teachers.calls import ConditionedPipeline, Given, Labels
from teachers.conditions.condition import ClassLabels, Condition, TextCondition
from teachers.data import NO_CLASS
from teachers.denoiser import check_denoiser
from teachers.guidance import GuidedDenoiser, check_guidance, guide
from teachers.inpainting import Images, forget, read_images, read_incomplete
from teachers.randomness import Generators, check_generators, check_shape
from teachers.released.published import check_published, is_published, published_components
from teachers.samplers.sampler import Sampler
from teachers.steps import StepCallback, StepEnd, callback_inputs
from teachers.tokenizers.patch import PatchTokenizer
from teachers.tokenizers.vq import VQTokenizer

ImageTokenizer = PatchTokenizer | VQTokenizer

OUTPUT_TYPES = ("pil", "pt", "np", "latent", "tokens")
FORMER_NAMES_OF_CLASSES = "class_names.json"  # where they were before the index had them
MAX_LOGITS = 2**27  # of a piece of a batch: half a GiB in float32, of which there are a few at a time


@dataclass
class MaskedDiffusionOutput(BaseOutput):
    """The images, the tokens (B, L) they were decoded from, and the network evaluations per image (the mean).

    With `output_type="tokens"` nothing is decoded and `images` are the tokens, with "latent" their codebook vectors
    (B, C, h, w).
    """

    images: list[PIL.Image.Image] | torch.Tensor | np.ndarray
    tokens: torch.Tensor
    nfe: float


class TokenPipeline(ConditionedPipeline):
    """What teacher and student share: a denoiser over the tokens of an image tokenizer."""

    # Tokenizer and initialiser are small beside what is offloaded, and asked for more than their `forward`.
    model_cpu_offload_seq = "text_encoder->denoiser"
    _exclude_from_cpu_offload: ClassVar = ["tokenizer", "initialiser"]

    tokenizer: ImageTokenizer

    @property
    def mask_token_id(self) -> int:
        return self.denoiser.mask_token_id

    @property
    def codebook_size(self) -> int:
        return self.tokenizer.codebook_size

    @property
    def token_grid(self) -> tuple[int, int]:
        return tuple(self.denoiser.config.token_grid)

    @property
    def sequence_length(self) -> int:
        return self.token_grid[0] * self.token_grid[1]

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1] -> tokens (B, L)."""
        return self.tokenizer.encode(images.to(self._execution_device))

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) -> images (B, C, H, W) in [0, 1]."""
        return self.tokenizer.decode(tokens)

    def check_tokens(self, tokens: torch.Tensor, shape: Sequence[int], masks: bool = True) -> None:
        """A ValueError where what a user gave is no tokens of this shape, with masks among them if there may be."""
        if tuple(tokens.shape) != tuple(shape) or tokens.is_floating_point():
            raise ValueError(
                f"tokens must be {tuple(shape)} whole numbers, got {tuple(tokens.shape)} of {tokens.dtype}"
            )
        known = (tokens >= 0) & (tokens < self.codebook_size)
        if masks:
            known |= tokens == self.mask_token_id
        if not known.all():
            allowed = f"0 to {self.codebook_size - 1}" + (f", or {self.mask_token_id} (the mask)" if masks else "")
            raise ValueError(f"tokens must be {allowed}; got {tokens[~known][0].item()}")

    def _shape(self, temperature: float | None, top_k: int | None, top_p: float | None) -> dict[str, Any]:
        """How logits are shaped: as a call asks for, or as the pipeline's settings say."""
        asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        shape: dict[str, Any] = {name: self.config[name] if value is None else value for name, value in asked.items()}
        check_shape(**shape)
        return shape

    def _start(self, latents: torch.Tensor | None, num_images: int) -> torch.Tensor:
        """The tokens (B, L) to start from: masks, or what a user gave of each image, or of each of as many in a row."""
        if latents is None:
            return torch.full((num_images, self.sequence_length), self.mask_token_id, device=self._execution_device)
        latents = torch.as_tensor(latents)
        latents = latents.flatten(1) if latents.dim() > 2 else latents
        if latents.dim() == 2 and (len(latents) == 0 or num_images % len(latents)):
            raise ValueError(
                f"got {len(latents)} images (or latents) to go on from, for prompts or labels that make {num_images}: "
                "pass one for all, or one for each"
            )
        if latents.dim() == 2:
            latents = latents.repeat_interleave(num_images // len(latents), 0)
        self.check_tokens(latents, (num_images, self.sequence_length))
        return latents.long().to(self._execution_device)

    def _pieces(self, condition: Condition, generator: Generators) -> Iterator[tuple[slice, Condition, Generators]]:
        """A batch in pieces whose logits fit into memory: their rows, conditions and generators."""
        generator = check_generators(generator, len(condition))
        size = max(1, MAX_LOGITS // (self.sequence_length * self.codebook_size))
        for start in range(0, len(condition), size):
            rows = slice(start, start + size)
            yield rows, condition.select(rows), generator[rows] if isinstance(generator, list) else generator

    def inpaint(self, image: Images, mask_image: Images, *call: Any, **settings: Any) -> MaskedDiffusionOutput | tuple:
        """Images with something new where a mask is white; the tokens of all else stay.

        Takes images of Pillow, tensors and arrays, or lists of them, and what a call of the pipeline takes. There is
        one mask for all images, or one for each. Every token under it is new, if only a pixel of it is, and nothing of
        what lies there is looked at.
        """
        images, is_new = read_incomplete(image, mask_image, self.tokenizer.image_shape, self.token_grid)
        tokens = self.encode(images)
        return self._complete(tokens.masked_fill(is_new.to(tokens.device), self.mask_token_id), *call, **settings)

    def image_to_image(
        self, image: Images, *call: Any, strength: float = 0.5, generator: Generators = None, **settings: Any
    ) -> MaskedDiffusionOutput | tuple:
        """Images of which a share `strength` in (0, 1] of the tokens, chosen at random, is new.

        Takes images of Pillow, tensors and arrays, or lists of them, and what a call of the pipeline takes.
        """
        tokens = self.encode(read_images(image, self.tokenizer.image_shape))
        if isinstance(generator, list | tuple) and len(generator) > len(tokens):
            tokens = tokens.repeat_interleave(len(generator) // len(tokens), 0)  # each image forgets on its own
        known = forget(tokens, strength, self.mask_token_id, check_generators(generator, len(tokens)))
        return self._complete(known, *call, generator=generator, **settings)

    def _complete(self, known: torch.Tensor, *call: Any, **settings: Any) -> MaskedDiffusionOutput | tuple:
        if self.condition_kind == "none" and settings.get("condition") is None:
            settings.setdefault("batch_size", len(known))
        return self(*call, latents=known, **settings)

    def _output(self, tokens: torch.Tensor, nfe: float, output_type: str, return_dict: bool):
        images: Any = tokens
        if output_type == "latent":
            images = self.tokenizer.codebook[tokens].transpose(1, 2).unflatten(2, self.token_grid)
        elif output_type != "tokens":
            images = self.decode(tokens)
        if output_type in ("pil", "np"):
            images = images.permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return MaskedDiffusionOutput(images=images, tokens=tokens, nfe=nfe)


def check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r} is not known; choose from {', '.join(OUTPUT_TYPES)}")


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
    the `negative_prompt` that guidance leads away from. With `class_names`, in the order of the labels, classes are
    asked for by name: `pipe(class_labels=["cat"])`.

    `from_pretrained` also opens aMUSEd, Meissonic and Monetico as they were published, with the settings of
    `published_components`.
    """

    _callback_tensor_inputs: ClassVar = ["latents"]
    _progress_bar_config: ClassVar = {"delay": 1.0}  # seconds; what is done sooner has no bar

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
        class_names: Sequence[str] | Mapping[str, str] | None = None,
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
        self._name_classes(class_names)

    @classmethod
    def _check_index(cls, name: str | Path, index: dict[str, Any]) -> None:
        if is_published(index):
            check_published(index)
        else:
            super()._check_index(name, index)

    @classmethod
    def _open(cls, folder: Path, index: dict[str, Any], network: dict[str, Any], **settings) -> Self:
        if is_published(index):
            return cls(**published_components(folder, network, **settings))
        if "class_names" not in index and (folder / FORMER_NAMES_OF_CLASSES).is_file():
            settings = {"class_names": json.loads((folder / FORMER_NAMES_OF_CLASSES).read_text()), **settings}
        return super()._open(folder, index, network, **settings)

    def denoise(self, tokens: torch.Tensor, condition: Condition, guidance_scale: float = 1.0) -> torch.Tensor:
        """Guided logits u + s (c - u) (B, L, V) for tokens (B, L)."""
        check_guidance(self.denoiser, guidance_scale)
        return guide(self.denoiser, tokens, condition, guidance_scale)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Sequence[str] | str | None = None,
        class_labels: Labels | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **given: Unpack[Given],
    ) -> MaskedDiffusionOutput | tuple:
        """Generate one image per prompt or class label, or as many as the rest of what is `Given` says.

        What is not given is the default of the sampler (`pipe.sampler.config`) or the pipeline (`pipe.config`). A list
        of generators, one per image, makes each image independent of the batch that it is made in.

        Args:
            latents: tokens (B, L) or (B, h, w) to start from, with masks where tokens are to be found; the others stay.
                As many as images, or fewer, each for as many images in a row. Default: masks alone.
            output_type: "pil", "pt" (B, C, H, W), "np" (B, H, W, C), "tokens" (B, L), or "latent": their codebook
                vectors (B, C, h, w).
            callback_on_step_end: (pipe, step, left, {"latents": tokens (B, L)}) -> such a dict, whose tokens sampling
                goes on with; `left` steps come after this at most. A batch too large for the memory is made in pieces,
                each of which goes through all steps.
        """
        check_output_type(output_type)
        num_steps = self.sampler.num_steps(num_inference_steps, self.sequence_length)
        inputs = callback_inputs(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        check_guidance(self.denoiser, guidance_scale)
        shape = self._shape(temperature, top_k, top_p)
        condition = self._condition(prompt, class_labels, **given)
        if guidance_scale != 1 and isinstance(condition, TextCondition) and condition.null_states is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} leads away from a negative prompt, and these conditions came encoded "
                "without one: pass negative_prompt_embeds and negative_encoder_hidden_states, or leave it at 1"
            )

        start, tokens, evaluations = self._start(latents, len(condition)), [], 0
        for rows, piece, generators in self._pieces(condition, generator):
            with self.progress_bar(total=num_steps) as bar:
                end_step = StepEnd(self, bar, num_steps, callback_on_step_end, inputs)
                denoise = GuidedDenoiser(
                    self.denoiser, piece, guidance_scale, self.config.guidance_ramp, on_step=end_step, **shape
                )
                sampled = self.sampler(
                    denoise, start[rows], num_inference_steps=num_inference_steps, generator=generators
                )
            tokens.append(sampled)
            evaluations += int(denoise.nfe.sum())
        return self._output(torch.cat(tokens), evaluations / len(condition), output_type, return_dict)
