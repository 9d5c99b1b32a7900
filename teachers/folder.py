"""Folders and files that are written whole or not at all, and safetensors that know where they come from."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from safetensors.torch import load_file, save_file

FORMER = ".former"  # what a folder is called by while another one takes its place


@contextlib.contextmanager
def new_folder(output: Path, shared: bool = False, replaces: bool = False) -> Iterator[Path]:
    """A folder to fill, which gets the name `output` at the end; after an error all is as it was.

    Raises ValueError if `output` is there and not empty. Where it is `shared`, other processes make the same one, and
    that of the first stays; where it `replaces` what is there, the last one stays. What a process was killed at
    replacing is put back first.
    """
    if not (shared or replaces) and _is_taken(output):
        raise ValueError(f"the output folder {output} is not empty; name another one or remove it")
    staging = output.with_name(f".{output.name}.{uuid4().hex}.staging")
    former = staging.with_suffix(FORMER)
    if replaces:
        _put_back(output)
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in staging.rglob("*"):
            let_others_read(path)
        if replaces and output.exists():
            os.replace(output, former)
        try:
            os.replace(staging, output)  # also of an empty one
        except OSError:
            if not shared or not _is_taken(output):
                raise
        if former.exists():
            os.replace(former, staging)  # by no name that it could be put back under, should its removal be cut short
    finally:
        if former.exists() and not output.exists():
            os.replace(former, output)
        shutil.rmtree(staging, ignore_errors=True)


def _put_back(output: Path) -> None:
    """Give a folder its name again that was moved aside for one that never came."""
    formers = list(output.parent.glob(f".{glob.escape(output.name)}.*{FORMER}"))
    if formers and not output.exists():
        os.replace(max(formers, key=lambda former: former.stat().st_mtime), output)


def _is_taken(output: Path) -> bool:
    return output.exists() and (not output.is_dir() or any(output.iterdir()))


@contextlib.contextmanager
def renewed_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, whose files then take the place of those in `output`, one by one.

    Another process that has one of them open, or mapped, keeps what it opened.
    """
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=_made(output.parent)) as staging:
        yield Path(staging)
        _made(output)
        for path in sorted(Path(staging).iterdir()):
            sync(path)
            os.replace(path, output / path.name)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` once it is on the disk; after an error all is as it was."""
    staging = path.with_name(f".{path.name}.{uuid4().hex}.staging")
    try:
        yield staging
        let_others_read(staging)
        sync(staging)
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def let_others_read(path: Path) -> None:
    """Give a file the rights of any new file: safetensors' are for its owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    if path.is_file():
        path.chmod(0o666 & ~umask)


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Return when a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def stamp(folder: Path, metadata: dict[str, str]) -> None:
    """Write metadata into the safetensors files of a component's folder."""
    for path in folder.glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt", **metadata})
