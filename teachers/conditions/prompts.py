"""Prompts: where they come from, and how they are encoded.

Shapes: N prompts, T text tokens, E text width, P pooled width.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from teachers.conditions.condition import Condition
from teachers.randomness import to_device
from teachers.sources.columns import captions
from teachers.sources.dataset import open_dataset

logger = logging.getLogger(__name__)

NOT_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
AESTHETIC_SCORE = 6.0  # of the micro-conditions, as aMUSEd and Meissonic are sampled


@dataclass
class PromptConfig:
    """Which prompts."""

    name: str = field(
        default="", metadata={"help": "a .txt file (a prompt each line), a .parquet file, a folder, a hub dataset's id"}
    )
    split: str = field(
        default="train", metadata={"help": "any that the dataset has, or a part: train[:1000], train[90%:]"}
    )
    column: str = field(
        default="text", metadata={"help": "column with the prompts, or lists of which the first counts"}
    )
    cache: str = field(
        default="", metadata={"help": "folder of their encodings, which runs share; empty: prompts/ beside the run's"}
    )


def load_prompts(config: PromptConfig) -> list[str]:
    """The prompts that the configuration names; ValueError or FileNotFoundError if there are none."""
    if Path(config.name).suffix == ".txt":
        if not Path(config.name).is_file():
            raise FileNotFoundError(f"there is no file of prompts {config.name}")
        prompts = [line.strip() for line in Path(config.name).read_text(encoding="utf-8").splitlines()]
        prompts = [prompt for prompt in prompts if prompt]
    else:
        dataset = open_dataset(config.name, config.split)
        prompts = captions(dataset, config.name, config.column)[:]
    if not prompts:
        raise ValueError(f"there are no prompts in {config.name}")
    return clean_prompts(prompts)


def clean_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts with a space for what steers terminals and files and is no text; a ValueError where one is not text.

    Control characters would be printed and written into model cards, and half of a surrogate pair cannot be encoded.
    """
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {row} is {prompt!r}, a {type(prompt).__name__}; prompts are text")
    return [NOT_TEXT.sub(" ", prompt) for prompt in prompts]


@torch.no_grad()
def encode_prompts(
    text_encoder: CLIPTextModelWithProjection, text_tokenizer: CLIPTokenizer, prompts: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states (N, T, E) before the last layer and the projected pooled embedding (N, P), as aMUSEd and Meissonic
    take them. Prompts that are too long are cut, which is reported."""
    tokens, num_cut = tokenize(text_tokenizer, clean_prompts(prompts))
    if num_cut:
        logger.warning(
            "%d of %d prompts are longer than %d tokens: what comes after is not seen",
            num_cut, len(prompts), text_tokenizer.model_max_length,
        )  # fmt: skip
    encoded = text_encoder(tokens.to(text_encoder.device), output_hidden_states=True)
    return encoded.hidden_states[-2], encoded.text_embeds


def tokenize(text_tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> tuple[torch.Tensor, int]:
    """Tokens (N, T), padded to the length that the tokenizer is for, and how many of the prompts were cut to it."""
    length, prompts = text_tokenizer.model_max_length, prompts[:]  # of a data set's column, a list
    whole = text_tokenizer(prompts, verbose=False).input_ids
    tokens = text_tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return tokens.input_ids, sum(len(prompt) > length for prompt in whole)


def micro_conditions(image_size: tuple[int, int], num_images: int, device: torch.device) -> torch.Tensor:
    """Width, height, no crop and the usual aesthetic score, (num_images, 5)."""
    height, width = image_size
    return to_device(torch.tensor([width, height, 0, 0, AESTHETIC_SCORE]), device).expand(num_images, -1)


class Prompts:
    """Prompts (N) as conditions to draw from, encoded by a pipeline when they are asked for."""

    def __init__(self, pipeline: Any, prompts: list[str]):
        self.pipeline, self.prompts = pipeline, prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def condition(self, rows: torch.Tensor, device: torch.device | str) -> Condition:
        return self.pipeline.encode_condition([self.prompts[row] for row in rows.tolist()]).to(device)
