"""The protocol of class-conditional ImageNet figures: FID, inception score, precision and recall of 50,000 images."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from eval.distances import Gaussian, frechet_distance, inception_score, precision_recall
from eval.inception import InceptionFeatures
from teachers.pipeline import TokenPipeline
from teachers.progress import progress_bar
from teachers.randomness import sample_generators

CHUNK_SIZE = 500


def read_statistics(path: Path) -> Gaussian:
    """Mean and covariance of real features, from the `mu` and `sigma` of an .npz file; nothing in it is run."""
    arrays = _open_npz(path)
    missing = [name for name in ("mu", "sigma") if name not in arrays]
    if missing:
        raise ValueError(f"{path} has no {' and no '.join(missing)}; expected statistics as ADM publishes them")
    mean, covariance = (torch.from_numpy(arrays[name]).double() for name in ("mu", "sigma"))
    if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{path}: mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} do not fit each other")
    return Gaussian(mean, covariance)


def read_images(path: Path) -> torch.Tensor:
    """Real images (N, 3, H, W) uint8 from the `arr_0` (N, H, W, 3) of an .npz file."""
    arrays = _open_npz(path)
    if "arr_0" not in arrays or arrays["arr_0"].ndim != 4 or arrays["arr_0"].dtype != np.uint8:
        raise ValueError(f"{path} has no arr_0 with uint8 images (N, H, W, 3)")
    return torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)


def _open_npz(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        arrays = np.load(path, allow_pickle=False)
        return {name: arrays[name] for name in arrays.files}
    except (ValueError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise ValueError(f"{path} is not an .npz file of plain arrays: {error}") from error


@torch.no_grad()
def write_features(
    pipeline: TokenPipeline,
    features: InceptionFeatures,
    folder: Path,
    num_images: int,
    *,
    seed: int = 0,
    batch_size: int = 50,
    process: int = 0,
    num_processes: int = 1,
    **settings,
) -> None:
    """Generate this process's share of the images and keep their features, chunk by chunk; what is there stays.

    Labels go round the classes, and each image has a generator of its own: any number of processes, and any
    interruption, give the same images.
    """
    chunks = range(-(-num_images // CHUNK_SIZE))[process::num_processes]
    for chunk in progress_bar(chunks, desc="images", unit="chunk", disable=process > 0):
        path = folder / f"chunk-{chunk:05d}.safetensors"
        if path.is_file():
            continue
        places = torch.arange(chunk * CHUNK_SIZE, min((chunk + 1) * CHUNK_SIZE, num_images))
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        for part in places.split(batch_size):
            generator = sample_generators("generate", seed, places=part.tolist())
            labels = part % pipeline.num_classes
            images = pipeline(class_labels=labels, generator=generator, output_type="pt", **settings).images
            found.append((features(images), features.probabilities(images)))
        staging = path.with_suffix(".staging")
        names = ("features", "probabilities")
        save_file(
            {name: torch.cat(parts).float() for name, parts in zip(names, zip(*found, strict=True), strict=True)},
            staging,
        )
        staging.rename(path)


def measure(
    folder: Path, num_images: int, statistics: Gaussian, real_features: torch.Tensor | None = None
) -> dict[str, float]:
    """FID, inception score and, where real features (N, D) are given, precision, recall, density and coverage.

    Raises ValueError where the folder's chunks are not all of the `num_images`.
    """
    chunks = [load_file(path) for path in sorted(folder.glob("chunk-*.safetensors"))]
    features, probabilities = (torch.cat([chunk[key] for chunk in chunks]) for key in ("features", "probabilities"))
    if len(features) != num_images:
        raise ValueError(f"{folder} holds the features of {len(features)} images, not of {num_images}")
    if features.shape[1] != len(statistics.mean):
        raise ValueError(f"features of {features.shape[1]} numbers, but statistics of {len(statistics.mean)}")
    measures = {"fid": frechet_distance(statistics, Gaussian.fit(features))}
    measures["inception_score"] = inception_score(probabilities)
    if real_features is not None:
        measures |= precision_recall(real_features, features)
    return measures
