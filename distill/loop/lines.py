"""Files of a line of JSON for every step that is logged, whatever becomes of disk and process."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from teachers.folder import new_file

logger = logging.getLogger(__name__)


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Write a whole line at the end; one that the disk does not take is lost, with a warning."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(json.dumps(values) + "\n")
    except OSError as error:
        logger.warning("a line of %s could not be written: %s", path, error)
        with contextlib.suppress(OSError):
            os.truncate(path, size)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines, but for a last one that a process was killed at; none where there is no file."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def trim_lines(path: Path, last_step: int) -> None:
    """Forget the lines of later steps."""
    if path.exists():
        kept = [line for line in read_lines(path) if line["step"] <= last_step]
        with new_file(path) as staging:
            staging.write_text("".join(json.dumps(line) + "\n" for line in kept))
