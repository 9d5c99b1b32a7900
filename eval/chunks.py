"""Features of very many images, in chunks that are kept: what an interruption leaves is not made again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from teachers.conditions.condition import Conditions
from teachers.folder import new_file
from teachers.pipeline import TokenPipeline
from teachers.progress import progress_bar
from teachers.randomness import sample_generators

CHUNK_SIZE = 500


def claim(folder: Path, protocol: dict[str, Any]) -> None:
    """Make the folder this evaluation's, or see that it is; features of other images are a ValueError."""
    path = folder / "protocol.json"
    if path.is_file():
        if json.loads(path.read_text()) != json.loads(json.dumps(protocol)):
            raise ValueError(f"{folder} holds an evaluation with other settings ({path}); name another folder")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"the output folder {folder} is not empty; name another one or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(protocol, indent=2))


@torch.no_grad()
def write_chunks(
    pipeline: TokenPipeline,
    conditions: Conditions,
    extract: Callable[[torch.Tensor], dict[str, torch.Tensor]],
    folder: Path,
    num_images: int,
    *,
    seed: int = 0,
    batch_size: int = 50,
    process: int = 0,
    num_processes: int = 1,
    **settings,
) -> None:
    """Generate this process's share of the images and keep what is extracted from them; what is there stays.

    Images go round the conditions, and each has a generator of its own: any number of processes, and any interruption,
    give the same images.
    """
    chunks = range(-(-num_images // CHUNK_SIZE))[process::num_processes]
    for chunk in progress_bar(chunks, desc="images", unit="chunk", disable=process > 0):
        path = folder / f"chunk-{chunk:05d}.safetensors"
        if path.is_file():
            continue
        numbers = torch.arange(chunk * CHUNK_SIZE, min((chunk + 1) * CHUNK_SIZE, num_images))
        found = []
        for part in numbers.split(batch_size):
            generator = sample_generators("generate", seed, places=part.tolist())
            condition = conditions.condition(part % len(conditions), pipeline.device)
            images = pipeline(condition=condition, generator=generator, output_type="pt", **settings).images
            found.append(extract(images))
        with new_file(path) as staging:
            save_file({name: torch.cat([part[name] for part in found]).float() for name in found[0]}, staging)


def read_chunks(folder: Path, num_images: int) -> dict[str, torch.Tensor]:
    """What was extracted, each (num_images, ...); a ValueError where it is not of so many images."""
    chunks = [load_file(path) for path in sorted(folder.glob("chunk-*.safetensors"))]
    found = {name: torch.cat([chunk[name] for chunk in chunks]) for name in (chunks[0] if chunks else ())}
    num_found = len(next(iter(found.values()), ()))
    if num_found != num_images:
        raise ValueError(f"{folder} holds the features of {num_found} images, not of {num_images}")
    return found
