"""Features of very many images, in chunks that are kept: what an interruption leaves is not made again.

Processes share them through the folder alone: each takes what nobody is at, and none waits for another but at the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from eval.evaluate import Batch, Features, generate
from eval.real import embed
from teachers.data import ImageData
from teachers.folder import new_file
from teachers.pipeline import TokenPipeline
from teachers.progress import progress_bar
from teachers.sharing import each_once

CHUNK_SIZE, REAL_CHUNK_SIZE = 100, 1000  # images: what an interruption costs at most; real ones are quickly seen


def claim(folder: Path, protocol: dict[str, Any]) -> None:
    """Make the folder this evaluation's, or see that it is; features of other images are a ValueError."""
    path = folder / "protocol.json"
    is_empty = all(found.name.startswith(".") for found in folder.glob("*"))  # but for what processes leave in passing
    if not is_empty and not path.is_file():
        raise ValueError(f"the output folder {folder} is not empty; name another one or remove it")
    for _ in each_once([path]):
        with new_file(path) as staging:
            staging.write_text(json.dumps(protocol, indent=2))
    known, ours = json.loads(path.read_text()), json.loads(json.dumps(protocol))
    if other := sorted(key for key in known.keys() | ours.keys() if known.get(key) != ours.get(key)):
        raise ValueError(
            f"{folder} holds an evaluation with other settings: {', '.join(other)} ({path}); name another folder"
        )


def write_chunks(
    folder: Path,
    name: str,
    num_images: int,
    make: Callable[[torch.Tensor], dict[str, torch.Tensor]],
    chunk_size: int = CHUNK_SIZE,
    is_shown: bool = True,
) -> None:
    """Have all chunks of this name in the folder, each what `make` gives for the numbers (n,) of its images.

    What is there stays. When it returns all are there, also those of other processes, and of some that have died.
    """
    paths = _paths(folder, name, num_images, chunk_size)
    missing = sum(not path.exists() for path in paths)
    for path in progress_bar(each_once(paths), total=missing, desc=name, unit="chunk", disable=not is_shown):
        with new_file(path) as staging:
            save_file(make(paths[path]), staging)


def read_chunks(folder: Path, name: str, num_images: int, chunk_size: int = CHUNK_SIZE) -> dict[str, torch.Tensor]:
    """What `write_chunks` had made, each (num_images, ...)."""
    chunks = [load_file(path) for path in _paths(folder, name, num_images, chunk_size)]
    return {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}


def write_real(folder: Path, features: Features, data: ImageData, is_shown: bool = True) -> None:
    """Have what `embed` gives of all real images in chunks in the folder."""

    def make(numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        return embed(features, data.subset(numbers))

    write_chunks(folder, "real", len(data), make, REAL_CHUNK_SIZE, is_shown)


def read_real(folder: Path, data: ImageData) -> dict[str, torch.Tensor]:
    """What `write_real` had made."""
    return read_chunks(folder, "real", len(data), REAL_CHUNK_SIZE)


def _paths(folder: Path, name: str, num_images: int, chunk_size: int) -> dict[Path, torch.Tensor]:
    numbers = torch.arange(num_images).split(chunk_size)
    return {folder / f"{name}-{number:05d}.safetensors": part for number, part in enumerate(numbers)}


def from_images(
    pipeline: TokenPipeline, extract: Callable[[torch.Tensor], dict[str, torch.Tensor]], **settings
) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """What to `make` of generated images: what is extracted of them (B, C, H, W), their "rows" and "nfe".

    The settings are those of `generate`.
    """

    def of_batch(batch: Batch) -> dict[str, torch.Tensor]:
        nfe = torch.full(batch.rows.shape, batch.nfe, dtype=torch.float64)
        return extract(batch.images) | {"rows": batch.rows, "nfe": nfe}

    def make(numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        found = [of_batch(batch) for batch in generate(pipeline, numbers, **settings)]
        return {key: torch.cat([part[key] for part in found]) for key in found[0]}

    return make
