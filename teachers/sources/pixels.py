"""The pixels of an image as numbers in [0, 1], whatever it was saved as."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import PIL.ImageColor
import PIL.TiffImagePlugin
import torch

# Modes of grey levels of more than 8 bits, and the formats that Pillow reads as 32 bits though they hold 16.
SIXTEEN_BITS, BITS = "I;16", "bits"
SIXTEEN_BITS_IN_32 = ("PNG", "PPM")


def read_image(row: dict[str, Any] | None, **settings) -> torch.Tensor:
    """`image_to_tensor` of a row of a `datasets.Image` column that is not decoded.

    A ValueError says what is wrong with an image that cannot be read, and names its file where there is one.
    """
    if row is None or (row["bytes"] is None and row["path"] is None):
        raise ValueError("its row holds none")
    try:
        return image_to_tensor(_decode(row), **settings)
    except (PIL.Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{row['path']}: {error}" if row["path"] else str(error)) from error


def open_image(path: Path) -> PIL.Image.Image:
    """The picture in a file, the right way up; a FileNotFoundError or ValueError where there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no picture {path}")
    try:
        return _decode({"bytes": None, "path": str(path)})
    except (PIL.Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is no picture that can be read: {error}") from error


def _decode(row: dict[str, Any]) -> PIL.Image.Image:
    """The picture of a row the right way up, with the bits of its grey levels in `info`: one that is turned is a copy
    without its format."""
    image = datasets.Image().decode_example(row)
    if image.mode.startswith(SIXTEEN_BITS):
        with PIL.Image.open(row["path"] if row["bytes"] is None else io.BytesIO(row["bytes"])) as file:
            if isinstance(file, PIL.TiffImagePlugin.TiffImageFile):  # whose 12 bits Pillow leaves as they are
                image.info[BITS] = file.tag_v2[PIL.TiffImagePlugin.BITSPERSAMPLE][0]
    return image


def image_to_tensor(
    image: PIL.Image.Image, size: int = 0, num_channels: int = 3, background: str = "white"
) -> torch.Tensor:
    """A (C, H, W) float tensor in [0, 1]; with a size, the centre square of the image resized to it.

    As to what is transparent and to unknown ranges, see `opaque`.
    """
    image = opaque(image, num_channels, background)
    if size:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        if side != size:
            image = image.resize((size, size), PIL.Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).view(image.height, image.width, num_channels).permute(2, 0, 1) / 255


def opaque(image: PIL.Image.Image, num_channels: int, background: str = "white") -> PIL.Image.Image:
    """The image in grey or colour with 8 bits a number.

    What is transparent shows the background, a colour that Pillow knows. A ValueError for a mode whose numbers have no
    known range.
    """
    image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, background), image)
    return image.convert("L" if num_channels == 1 else "RGB")


def _eight_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image with 8 bits a number; Pillow itself would cut what is larger."""
    if not image.mode.startswith(("I", "F")):
        return image
    if not (image.mode.startswith(SIXTEEN_BITS) or (image.mode == "I" and image.format in SIXTEEN_BITS_IN_32)):
        raise ValueError(
            f"the range of its numbers (Pillow's mode {image.mode}) is not known; save it with 8 or 16 bits"
        )
    levels, largest = np.asarray(image), 2 ** image.info.get(BITS, 16) - 1
    grey = PIL.Image.fromarray((levels * (255 / largest)).round().astype(np.uint8))
    if "transparency" in image.info:  # the level that is
        grey.putalpha(PIL.Image.fromarray(np.where(levels == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def check_colour(colour: str) -> None:
    """A ValueError unless Pillow knows it as an opaque colour."""
    try:
        known = len(PIL.ImageColor.getrgb(colour)) == 3
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"background={colour!r} must be a colour: a name such as white, or '#rrggbb'")
