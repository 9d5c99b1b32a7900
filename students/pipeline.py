"""The one-step student as a diffusers pipeline."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from diffusers import ModelMixin
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from students.initialisation import TokenInitialiser
from teachers.calls import Given, Labels
from teachers.denoiser import check_denoiser
from teachers.pipeline import ImageTokenizer, MaskedDiffusionOutput, TokenPipeline, check_output_type
from teachers.randomness import Generators, sample_tokens
from teachers.steps import StepCallback

logger = logging.getLogger(__name__)

OF_TEACHERS = (
    "negative_prompt",
    "negative_prompt_embeds",
    "negative_encoder_hidden_states",
    "callback_on_step_end",
)


class OneStepPipeline(TokenPipeline):
    """A generator that needs one network evaluation: `pipe(class_labels=[3, 7]).images`, `pipe("a prompt").images`
    or, unconditional, `pipe(batch_size=4).images`.

    `temperature`, `top_k` and `top_p` are the defaults for drawing tokens, saved with the pipeline. With `class_names`,
    in the order of the labels, classes are asked for by name: `pipe(class_labels=["cat"])`.
    """

    initialiser: TokenInitialiser

    def __init__(
        self,
        denoiser: ModelMixin,
        tokenizer: ImageTokenizer,
        initialiser: TokenInitialiser,
        text_encoder: CLIPTextModelWithProjection | None = None,
        text_tokenizer: CLIPTokenizer | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        class_names: Sequence[str] | Mapping[str, str] | None = None,
    ):
        super().__init__()
        check_denoiser(denoiser)
        self.register_modules(
            denoiser=denoiser,
            tokenizer=tokenizer,
            initialiser=initialiser,
            text_encoder=text_encoder,
            text_tokenizer=text_tokenizer,
        )
        self.register_to_config(temperature=temperature, top_k=top_k, top_p=top_p)
        self._name_classes(class_names)

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
        **given: Unpack[Given],
    ) -> MaskedDiffusionOutput | tuple:
        """Generate one image per prompt or class label, or as many as the rest of what is `Given` says, with one
        evaluation each.

        What is not given is the pipeline's default (`pipe.config`). A list of generators, one per image, makes each
        image independent of the batch that it is made in. `num_inference_steps`, `guidance_scale`, a negative prompt
        and a callback are a teacher's, and refused unless they ask for one step without guidance.

        Args:
            latents: tokens (B, L) or (B, h, w) with masks where tokens are to be found; the others stay. As many as
                images, or fewer, each for as many images in a row. It takes a student that was distilled with
                `initial.known_tokens`. Default: nothing is known.
        """
        check_output_type(output_type)
        check_one_step(num_inference_steps, guidance_scale, callback_on_step_end=callback_on_step_end, **given)
        shape = self._shape(temperature, top_k, top_p)
        condition = self._condition(prompt, class_labels, **given)
        if latents is not None and self.initialiser.config.known_tokens == 0:
            logger.warning("this student was distilled for whole images (initial.known_tokens=0), not to complete them")
        known, tokens = self._start(latents, len(condition)), []
        for rows, piece, generators in self._pieces(condition, generator):
            initial = self.initialiser(piece, generators, known[rows])
            logits = self.denoiser(initial, piece, self.initialiser.perturbation(initial, known[rows], generators))
            tokens.append(self.initialiser.keep(sample_tokens(logits, generators, **shape), known[rows]))
        return self._output(torch.cat(tokens), 1.0, output_type, return_dict)


def check_one_step(num_inference_steps: int | None, guidance_scale: float | None, **asked: Any) -> None:
    """A ValueError where a call asks of a student for what only a teacher of many steps can do."""
    if num_inference_steps not in (None, 1):
        raise ValueError(f"num_inference_steps={num_inference_steps}: a one-step student takes one step; leave it out")
    if guidance_scale not in (None, 1):
        raise ValueError(
            f"guidance_scale={guidance_scale}: guidance is distilled into a one-step student, which is not guided "
            "again; leave it out"
        )
    for name in OF_TEACHERS:
        if asked.get(name) is not None:
            raise ValueError(f"{name} is for teachers, which take many guided steps; a one-step student knows none")
