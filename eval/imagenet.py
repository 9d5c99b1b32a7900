"""The protocol of class-conditional ImageNet figures: FID, inception score, precision and recall of 50,000 images."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.chunks import read_chunks
from eval.distances import Gaussian, frechet_distance, inception_score, precision_recall


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


def measure(
    folder: Path, num_images: int, statistics: Gaussian, real_features: torch.Tensor | None = None
) -> dict[str, float]:
    """FID, inception score and, where real features (N, D) are given, precision, recall, density and coverage.

    Raises ValueError where the folder's chunks are not all of the `num_images`.
    """
    found = read_chunks(folder, num_images)
    features = found["features"]
    if features.shape[1] != len(statistics.mean):
        raise ValueError(f"features of {features.shape[1]} numbers, but statistics of {len(statistics.mean)}")
    measures = {"fid": frechet_distance(statistics, Gaussian.fit(features))}
    measures["inception_score"] = inception_score(found["probabilities"])
    if real_features is not None:
        measures |= precision_recall(real_features, features)
    return measures
