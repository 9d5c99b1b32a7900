"""The one-step student as a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ModelMixin
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from students.initialisation import TokenInitialiser
from teachers.conditions.condition import Condition
from teachers.denoiser import check_denoiser
from teachers.pipeline import ImageTokenizer, MaskedDiffusionOutput, TokenPipeline
from teachers.randomness import Generators, sample_tokens


class OneStepPipeline(TokenPipeline):
    """A generator that needs one network evaluation: `pipe(class_labels=[3, 7]).images`, `pipe("a prompt").images`
    or, unconditional, `pipe(batch_size=4).images`.

    `temperature`, `top_k` and `top_p` are the defaults for drawing tokens, saved with the pipeline.
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

    @torch.no_grad()
    def __call__(
        self,
        prompt: Sequence[str] | str | None = None,
        class_labels: Sequence[int] | torch.Tensor | int | None = None,
        *,
        condition: Condition | None = None,
        batch_size: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> MaskedDiffusionOutput | tuple:
        """Generate one image per prompt or class label, or per row of an encoded `condition`, or `batch_size` images
        (default 1) of an unconditional student, with one evaluation each.

        What is not given is the pipeline's default (`pipe.config`). A list of generators, one per image, makes each
        image independent of the batch that it is made in.
        """
        condition = self._condition(prompt, class_labels, condition, batch_size)
        tokens = []
        for piece, generators in self._pieces(condition, generator):
            initial = self.initialiser(piece, generators)
            logits = self.denoiser(initial, piece, self.initialiser.perturbation(generators))
            drawn = sample_tokens(
                logits,
                generators,
                temperature=self.config.temperature if temperature is None else temperature,
                top_k=self.config.top_k if top_k is None else top_k,
                top_p=self.config.top_p if top_p is None else top_p,
            )
            tokens.append(drawn)
        return self._output(torch.cat(tokens), 1.0, output_type, return_dict)
