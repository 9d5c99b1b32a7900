"""The job that trains a small CLIP on captioned images (arXiv 2103.00020): to condition a teacher, or to score with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from distill.config import section, setting
from distill.jobs.run import note_saved, note_settings, open_run
from distill.jobs.sources import SOURCES, check_data, data_sources, note_sources
from distill.loop.batches import ShuffledRows
from distill.loop.checkpoint import has_checkpoints
from distill.loop.config import TrainingConfig
from distill.loop.host import by_main_process
from distill.loop.trainer import CHECKPOINTS, Trainer, on_main_process
from teachers.conditions.prompts import tokenize
from teachers.data import DataConfig, ImageData, load_data
from teachers.folder import new_folder
from teachers.objectives.objective import Objective
from teachers.randomness import derive_seed, rand, to_device
from teachers.sharing import each_once

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
BYTES = sorted(ByteLevel.alphabet())  # as letters
VOCABULARY = "vocabulary"
LETTERS = [*BYTES, *(byte + WORD_END for byte in BYTES)]


@dataclass
class CLIPNetworkConfig:
    """Both towers."""

    hidden_size: int = setting(128, "width")
    num_layers: int = setting(4, "blocks of each tower")
    num_attention_heads: int = setting(4, "attention heads")
    projection_size: int = setting(128, "width of the space where images and captions meet")
    patch_size: int = setting(8, "side of an image patch, in pixels")
    vocabulary_size: int = setting(2048, "text tokens at most, found by byte-pair encoding of the captions")
    num_text_tokens: int = setting(32, "of a caption, with its start and end; what is longer is cut")
    dropout: float = setting(0.1, "of attention weights")

    def __post_init__(self) -> None:
        smallest = 2 + len(LETTERS)
        if self.vocabulary_size < smallest:
            raise ValueError(f"network.vocabulary_size={self.vocabulary_size} must be at least {smallest}: all bytes")


@dataclass
class CLIPJob:
    """Train a small CLIP on captioned images."""

    output: str = setting("runs/clip", "folder of the run; the CLIP is written to OUTPUT/clip")
    data: DataConfig = section(lambda: DataConfig(text_column="text", label_column="", num_channels=3), "the images")
    network: CLIPNetworkConfig = section(CLIPNetworkConfig, "the network")
    shift: int = setting(4, "images are moved by up to so many pixels, their edges repeated")
    training: TrainingConfig = section(TrainingConfig, "the loop")
    monitor: DataConfig = section(
        lambda: DataConfig(name="", text_column="text", label_column="", num_channels=3), "other images to test it on"
    )


Monitor = Callable[[CLIPModel, CLIPProcessor, int], dict[str, float]]


class ContrastiveObjective(Objective):
    """Each image finds its caption among those of the batch, and each caption its image."""

    averaged, updates = "clip", (("clip",),)

    def __init__(self, clip: CLIPModel):
        self.networks = {"clip": clip}

    def losses(
        self,
        networks: dict[str, nn.Module],
        update: tuple[str, ...],
        batch: tuple[torch.Tensor, torch.Tensor],
        generators: list[torch.Generator],
        measured: bool = False,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        images, tokens = batch
        output = networks["clip"](input_ids=tokens, pixel_values=images, return_loss=True)
        metrics = {}
        if measured:
            found = output.logits_per_image.argmax(-1) == torch.arange(len(images), device=images.device)
            metrics = {"loss": output.loss, "accuracy": found.float().mean()}
        return {"clip": output.loss}, metrics


def train_clip(job: CLIPJob, monitor: Monitor | None = None) -> bool:
    """Run the job; `monitor(clip, processor, step)` measures the averaged weights now and then.

    False if interrupted.
    """
    data = load_data(job.data)
    if data.texts is None:
        raise ValueError("a CLIP learns from captions: name their column (data.text_column)")
    accelerator, output = open_run(job, prepared=(VOCABULARY, SOURCES))
    sources = data_sources(data, captions=hashlib.sha256("\n".join(data.texts).encode()).hexdigest())
    if has_checkpoints(output / CHECKPOINTS):
        by_main_process(lambda: check_data(output, sources, labels_are_saved=True))  # there are none
    tokenizer = vocabulary_of_run(output, data.texts, job.network)
    processor = CLIPProcessor(make_image_processor(data), tokenizer)
    torch.manual_seed(derive_seed(job.training.seed, "clip"))
    clip = make_clip(job.network, data, tokenizer)
    images = processor.image_processor(
        [(255 * image).byte() for image in data.images("images")], return_tensors="pt"
    ).pixel_values
    tokens, _ = tokenize(tokenizer, data.texts)
    rows = ShuffledRows(len(data), job.training.batch_size, job.training.seed)

    def draw_batch(step: int, places: range, generators: list[torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = rows(step, places)
        moved = shift_images(images[chosen], job.shift, generators)
        return to_device(moved, accelerator.device), to_device(tokens[chosen], accelerator.device)

    def evaluate(network: CLIPModel, step: int) -> dict[str, float]:
        assert monitor is not None
        return monitor(network, processor, step)

    trainer = Trainer(
        job.training,
        accelerator,
        ContrastiveObjective(clip.train()),
        draw_batch=draw_batch,
        output=output,
        evaluate=on_main_process(evaluate) if monitor is not None else None,
        run_settings=asdict(job.network) | {"batch_size": job.training.batch_size},
    )
    note_settings(job)
    by_main_process(lambda: note_sources(output, sources))
    finished = trainer.train()
    note_saved(job)
    network = trainer.averaged_network()
    accelerator.end_training()
    if finished and accelerator.is_main_process:
        with new_folder(output / "clip", replaces=True) as folder:
            for part in (network, processor, tokenizer):
                part.save_pretrained(folder)
    return finished


def vocabulary_of_run(output: Path, captions: Sequence[str], config: CLIPNetworkConfig) -> CLIPTokenizer:
    """The text tokenizer that a run was begun with, made where it begins: another version may make another one."""
    if has_checkpoints(output / CHECKPOINTS) and not (output / VOCABULARY).is_dir():
        raise ValueError(f"the run in {output} has no {VOCABULARY} folder to go on with; name another output folder")
    for path in each_once([output / VOCABULARY]):
        with new_folder(path, shared=True) as folder:
            make_text_tokenizer(captions, config).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(output / VOCABULARY)


def shift_images(images: torch.Tensor, largest: int, generators: list[torch.Generator]) -> torch.Tensor:
    """Images (B, C, H, W), each moved by up to `largest` pixels to every side."""
    if largest == 0:
        return images
    height, width = images.shape[-2:]
    padded = F.pad(images, (largest,) * 4, mode="replicate")
    offsets = (rand(len(images), 2, generator=generators, device=images.device) * (2 * largest + 1)).long()
    return torch.stack(
        [
            image[:, top : top + height, left : left + width]
            for image, (top, left) in zip(padded, offsets.tolist(), strict=True)
        ]
    )


def make_text_tokenizer(captions: Sequence[str], config: CLIPNetworkConfig) -> CLIPTokenizer:
    """CLIP's kind of tokenizer, its vocabulary found in the captions.

    Each byte is in it, also as the last of a word: nothing is unknown, which would be the same token as the end.
    """
    blank = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[])
    trained = blank.train_new_from_iterator(captions, vocab_size=config.vocabulary_size)
    merges: Any  # transformers declares them as strings, and takes pairs
    merges = [tuple(merge) for merge in json.loads(trained.backend_tokenizer.to_str())["model"]["merges"]]
    merges = merges[: config.vocabulary_size - 2 - len(LETTERS)]
    words = dict.fromkeys([START, END, *LETTERS, *("".join(merge) for merge in merges)])
    return CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=merges,
        model_max_length=config.num_text_tokens,
        split_special_tokens=True,  # a caption may say so, and does not end there
    )


def make_image_processor(data: ImageData) -> CLIPImageProcessor:
    """How images become the vision tower's input: at their size, with their own mean and deviation."""
    images = data.images()
    mean, deviation = images.mean((0, 2, 3)).tolist(), images.std((0, 2, 3)).tolist()
    height, width = images.shape[-2:]
    size = {"height": height, "width": width}
    return CLIPImageProcessor(size=size, crop_size=size, image_mean=mean, image_std=deviation)


def make_clip(config: CLIPNetworkConfig, data: ImageData, tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP for these images and captions."""
    image, _ = data[0]
    tower = {
        "hidden_size": config.hidden_size,
        "intermediate_size": 4 * config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "attention_dropout": config.dropout,
        "projection_dim": config.projection_size,
    }
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    length = {"max_position_embeddings": config.num_text_tokens}
    return CLIPModel(
        CLIPConfig(
            text_config={**tower, **special, **length, "vocab_size": len(tokenizer)},
            vision_config={**tower, "image_size": image.shape[-1], "patch_size": config.patch_size},
            projection_dim=config.projection_size,
        )
    )
