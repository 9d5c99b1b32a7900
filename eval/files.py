"""What a measurement writes: each file whole, or as it was before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image

from teachers.folder import new_file


def write_text(path: Path, text: str) -> None:
    with new_file(path) as staging:
        staging.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2))


def write_picture(path: Path, picture: PIL.Image.Image) -> None:
    """Write a picture in the format that its name ends with."""
    picture_format = format_of(path)
    with new_file(path) as staging:
        picture.save(staging, format=picture_format)


def format_of(path: Path) -> str:
    """The format that a picture's name ends with; ValueError if none can be written that is called so."""
    found = PIL.Image.registered_extensions().get(path.suffix.lower())
    if found not in PIL.Image.SAVE:
        raise ValueError(f"{path} does not end as a picture's name does; call it {path.with_suffix('.png')}")
    return found
