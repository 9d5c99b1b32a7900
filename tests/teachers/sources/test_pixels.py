import io
import struct

import numpy as np
import PIL.Image
import pytest
import torch

from teachers.data import DataConfig
from teachers.sources.pixels import image_to_tensor, read_image


def reopened(image, kind="PNG", **settings):
    """The image as a file of that kind gives it back."""
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return PIL.Image.open(io.BytesIO(file.getvalue()))


def test_the_centre_square_is_kept():
    pixels = np.zeros((4, 8), dtype=np.uint8)
    pixels[:, 2:6] = 255
    assert (image_to_tensor(PIL.Image.fromarray(pixels), size=4, num_channels=1) == 1).all()


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_shades(kind, num_channels):
    ramp = np.linspace(0, 48_000, 64).astype(np.uint16).reshape(8, 8)
    found = image_to_tensor(reopened(PIL.Image.fromarray(ramp), kind), num_channels=num_channels)
    expected = torch.from_numpy(ramp / 65_535).float().expand(num_channels, 8, 8)
    torch.testing.assert_close(found, expected, atol=0.5 / 255 + 1e-6, rtol=0)


def test_the_largest_numbers_are_white_in_either_order_of_bytes():
    for mode in ("I;16", "I;16B"):
        image = PIL.Image.frombytes(mode, (2, 1), b"\0\0\xff\xff")
        assert image_to_tensor(image, num_channels=1).flatten().tolist() == [0, 1]


@pytest.mark.parametrize("orientation", [None, 1, 3])
def test_twelve_bits_have_their_own_range(tmp_path, orientation):
    """Of a camera: black, a quarter, three quarters and white, in a row; the third orientation is upside down."""
    levels = [0, 1024, 3072, 4095]
    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 274: orientation, 277: 1, 278: 1, 279: 6}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items() if value is not None]
    packed = sum(level << 12 * place for place, level in enumerate(reversed(levels))).to_bytes(6, "big")
    content = b"II*\0" + struct.pack("<I", 14) + packed + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    (tmp_path / "0.tiff").write_bytes(content)
    for row in ({"path": str(tmp_path / "0.tiff"), "bytes": None}, {"path": None, "bytes": content}):
        found = read_image(row, num_channels=1).flatten()
        expected = torch.tensor(levels[::-1] if orientation == 3 else levels) / 4095
        torch.testing.assert_close(found, expected, atol=0.5 / 255 + 1e-6, rtol=0)


@pytest.mark.parametrize("numbers", [np.int32, np.float32])
def test_numbers_of_unknown_range_are_refused(numbers):
    image = reopened(PIL.Image.fromarray(np.full((2, 2), 300, dtype=numbers)), "TIFF")
    with pytest.raises(ValueError, match=f"mode {image.mode}"):
        image_to_tensor(image)


def transparent_images():
    red = PIL.Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    palette = PIL.Image.new("P", (2, 2))
    palette.putpalette([255, 0, 0])
    grey16 = PIL.Image.fromarray(np.full((2, 2), 700, dtype=np.uint16))
    yield "RGBA", red
    yield "LA", PIL.Image.new("LA", (2, 2), (9, 0))
    yield "P", reopened(palette, transparency=0)
    yield "RGB", reopened(PIL.Image.new("RGB", (2, 2), (255, 0, 0)), transparency=(255, 0, 0))
    yield "L", reopened(PIL.Image.new("L", (2, 2), 9), transparency=9)
    yield "I;16", reopened(grey16, transparency=700)


@pytest.mark.parametrize(("mode", "image"), [pytest.param(*each, id=each[0]) for each in transparent_images()])
def test_what_is_transparent_shows_the_background(mode, image):
    assert image.mode == mode
    assert (image_to_tensor(image) == 1).all()
    colour = image_to_tensor(image, background="#003366")[:, 0, 0]
    torch.testing.assert_close(colour, torch.tensor([0, 0x33, 0x66]) / 255)


def test_half_of_the_background_is_seen_through_half_an_alpha():
    image = PIL.Image.new("RGBA", (1, 1), (200, 0, 100, 51))  # a fifth
    found = image_to_tensor(image, background="#64c800").flatten()
    torch.testing.assert_close(found, torch.tensor([120, 160, 20]) / 255, atol=1.01 / 255, rtol=0)


def test_only_an_opaque_colour_is_a_background():
    for colour in ("greenish", "", "#ff", "#00000000"):
        with pytest.raises(ValueError, match="background="):
            DataConfig(background=colour)
    assert DataConfig(background="navy").background == "navy"


def test_the_first_picture_of_an_animation_counts():
    first, second = (PIL.Image.new("L", (3, 3), shade) for shade in (0, 255))
    image = reopened(first, "GIF", save_all=True, append_images=[second])
    assert image.n_frames == 2
    assert (image_to_tensor(image) == 0).all()


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"torn\.png"):
        read_image({"path": str(tmp_path / "torn.png"), "bytes": None})
    for nothing in (None, {"path": None, "bytes": None}):
        with pytest.raises(ValueError, match="none"):
            read_image(nothing)
