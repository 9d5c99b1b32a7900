"""Inception features for FID and KID, by clean-fid's resizing and network (arXiv 2104.11222)."""

from __future__ import annotations

import argparse
import urllib.error
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from cleanfid.downloads_helper import check_download_inception
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer

from teachers.folder import file_digest, renewed_folder
from teachers.sharing import each_once

WEIGHTS = "inception-2015-12-05.pt"
SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
CACHE = Path.home() / ".cache" / "one-step-mdm"
FEATURE_SIZE = 2048


def add_inception_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--inception-path", type=Path, help="Inception weights; default: downloaded once")
    parser.add_argument("--few-images", action="store_true", help=f"allow FID of fewer than {FEATURE_SIZE:,} images")


def check_num_images(options: argparse.Namespace, **counts: int) -> None:
    """A ValueError where the covariance of so few images, by what they are, has no full rank, unless it is allowed."""
    for name, num_images in counts.items():
        if num_images < FEATURE_SIZE and not options.few_images:
            raise ValueError(
                f"FID of {num_images} {name.replace('_', ' ')} is not one: the covariance of its {FEATURE_SIZE:,} "
                f"features needs as many images to have full rank. Take more, or say --few-images"
            )


def find_weights(path: Path | None) -> Path:
    """The Inception weights at the path or in the cache, downloaded on first use; FileNotFoundError if neither."""
    if path is not None:
        file = path / WEIGHTS if path.is_dir() else path
        if file.name != WEIGHTS or not file.is_file():
            raise FileNotFoundError(f"there are no Inception weights at {path}; expected a file named {WEIGHTS}")
        return file
    file = CACHE / WEIGHTS
    for _ in each_once([file]):
        try:
            with renewed_folder(CACHE) as staging:  # a part of it would be taken for the whole
                check_download_inception(str(staging))
        except (urllib.error.URLError, OSError) as error:
            raise FileNotFoundError(
                f"the Inception weights could not be downloaded ({error}); put {WEIGHTS} into {CACHE} or name it with "
                "--inception-path. FD on a classifier's features (--features classifier) needs no download"
            ) from error
    return file


class InceptionFeatures:
    """The 2048-d features that FID is defined on; grey images are repeated over three channels.

    `mode` is clean-fid's: "clean" resizes as PIL does, "legacy_tensorflow" as the first FID code did, which is what
    published ImageNet figures use.
    """

    distance_names = ("fid", "kid")

    def __init__(self, path: Path | None = None, device: torch.device | str = "cpu", mode: str = "clean"):
        weights = find_weights(path)
        digest = file_digest(weights)
        if digest != SHA256:  # it is TorchScript: to open it is to run it
            raise ValueError(f"{weights} is refused: its SHA-256 is {digest}, that of the Inception weights {SHA256}")
        self.name = f"Inception (clean-fid, mode {mode}, images rounded to uint8; weights sha256 {digest})"
        self.device = device
        resize_inside = mode == "legacy_tensorflow"
        network = InceptionV3W(str(weights.parent), download=False, resize_inside=resize_inside)
        self._network = network.to(device).eval()
        self._resize = build_resizer(mode)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features (N, 2048) of images (N, C, H, W) in [0, 1]."""
        return torch.cat([self._network(self._prepare(part)).cpu() for part in images.split(64)])

    @torch.no_grad()
    def probabilities(self, features: torch.Tensor) -> torch.Tensor:
        """Class probabilities (N, K) of images with these features (N, 2048): what the network's last layer makes of
        them, without its bias as in the first IS."""
        last = self._network.base.output
        return F.linear(features.to(self.device), last.weight).softmax(-1).cpu()

    def judge(self, features: torch.Tensor, rows: torch.Tensor) -> dict[str, float]:
        return {}

    def _prepare(self, images: torch.Tensor) -> torch.Tensor:
        pixels = (images.expand(-1, 3, -1, -1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        resized = np.stack([self._resize(image) for image in pixels])
        return torch.from_numpy(resized).permute(0, 3, 1, 2).float().to(self.device)
