"""Files that images are read from, by what the file system says of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


def fingerprint(folder: Path, files: Iterable[str]) -> str:
    """That of files below a folder: another one where a file has been changed, moved, added or removed.

    A ValueError names a file that Arrow could not, as its name is not UTF-8.
    """
    found = hashlib.sha256()
    for name in files:
        path = os.path.join(folder, name)
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the name of the file {path!r} is not UTF-8; rename it") from error
        status = os.stat(path)
        found.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return found.hexdigest()[:16]
