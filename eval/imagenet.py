"""The protocol of class-conditional ImageNet figures: FID, inception score, precision and recall of 50,000 images."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch

from eval.distances import (
    MIN_SAMPLES,
    Gaussian,
    check_num_samples,
    frechet_distance,
    inception_score,
    precision_recall,
)
from eval.inception import FEATURE_SIZE


def read_statistics(path: Path) -> Gaussian:
    """Mean and covariance of real Inception features, from `mu` and `sigma` of an .npz file; nothing in it is run."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        archive = np.load(path, allow_pickle=False)
        arrays = {name: archive[name] for name in archive.files}
    except (ValueError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise ValueError(f"{path} is not an .npz file of plain arrays: {error}") from error
    missing = [name for name in ("mu", "sigma") if name not in arrays]
    if missing:
        raise ValueError(f"{path} has no {' and no '.join(missing)}; expected statistics as ADM publishes them")
    mean, covariance = (torch.from_numpy(arrays[name]).double() for name in ("mu", "sigma"))
    if mean.shape != (FEATURE_SIZE,) or covariance.shape != (FEATURE_SIZE, FEATURE_SIZE):
        raise ValueError(
            f"{path} has mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}; expected statistics of the "
            f"{FEATURE_SIZE} features of Inception"
        )
    return Gaussian(mean, covariance)


class NpzImages:
    """The real images in the `arr_0` (N, H, W, 3) uint8 of an .npz file, which are never all in memory."""

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        try:
            with self._open() as file:
                self.shape, is_fortran, dtype = _read_header(file)
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} has no arr_0 with uint8 images (N, H, W, 3): {error}") from error
        if len(self.shape) != 4 or self.shape[3] != 3 or dtype != np.uint8 or is_fortran:
            raise ValueError(f"{path} has no arr_0 with uint8 images (N, H, W, 3), but {dtype} {self.shape}")

    def __len__(self) -> int:
        return self.shape[0]

    def check(self, image_size: tuple[int, int]) -> None:
        """A ValueError where they are too few to compare with, or of another size (height, width)."""
        check_num_samples(MIN_SAMPLES, real_images=len(self))
        if self.shape[1:3] != tuple(image_size):
            raise ValueError(
                f"{self.path} has images of {self.shape[1]}x{self.shape[2]}, and the pipeline makes images of "
                f"{image_size[0]}x{image_size[1]}: figures of one size do not compare with those of another"
            )

    def batches(self, batch_size: int = 64) -> Iterator[torch.Tensor]:
        """All images in order, (B, 3, H, W) in [0, 1]."""
        num_images, height, width, num_channels = self.shape
        with self._open() as file:
            _read_header(file)
            for start in range(0, num_images, batch_size):
                shape = min(batch_size, num_images - start), height, width, num_channels
                try:
                    pixels = np.frombuffer(file.read(int(np.prod(shape))), np.uint8).reshape(shape)
                except (ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
                    raise ValueError(f"{self.path} is damaged at image {start} or soon after: {error}") from error
                yield torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2) / 255

    def _open(self) -> IO[bytes]:
        return zipfile.ZipFile(self.path).open("arr_0.npy")


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return read[np.lib.format.read_magic(file)](file)


def measure(
    features: torch.Tensor,
    probabilities: torch.Tensor,
    statistics: Gaussian,
    real_features: torch.Tensor | None = None,
) -> dict[str, float]:
    """FID of features (N, D), inception score of class probabilities (N, K) and, where real features are given,
    precision, recall, density and coverage."""
    measures = {"fid": frechet_distance(statistics, Gaussian.fit(features))}
    measures["inception_score"] = inception_score(probabilities)
    if real_features is not None:
        measures |= precision_recall(real_features, features)
    return measures
