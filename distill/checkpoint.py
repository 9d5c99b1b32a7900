"""Checkpoints that are whole or not there: staged, hashed, renamed into place.

A checkpoint is a folder `step-000100` whose `manifest.json`, written last, holds the size and SHA-256 of every file.
It is a training state, not an interchange format: it holds optimizer states as pickles that are only ever read back
with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def save_checkpoint(
    accelerator: Accelerator, directory: Path, step: int, keep: int, write: Callable[[Path], None]
) -> Path:
    """Save the accelerator's state and what `write(folder)` adds to it; then remove all but the newest `keep`.

    All processes call it; `write` runs on the main one.
    """
    final = directory / f"step-{step:06d}"
    staging = directory / f".staging-{step:06d}"
    if accelerator.is_main_process:
        for leftover in directory.glob(".staging-*"):
            shutil.rmtree(leftover)
        staging.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(staging))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write(staging)
        _write_manifest(staging, step)
        if final.exists():
            shutil.rmtree(final)
        os.replace(staging, final)
        _sync(directory)
        for old in _checkpoints(directory)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def newest_checkpoint(directory: Path) -> Path:
    """The newest checkpoint that is whole; raises FileNotFoundError where there is none."""
    for checkpoint in reversed(_checkpoints(directory)):
        try:
            verify_checkpoint(checkpoint)
        except ValueError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
        else:
            return checkpoint
    raise FileNotFoundError(f"there is no whole checkpoint in {directory}")


def verify_checkpoint(checkpoint: Path) -> int:
    """The step of a checkpoint, after every file was compared with its manifest; raises ValueError if one differs."""
    manifest_path = checkpoint / MANIFEST
    if not manifest_path.is_file():
        raise ValueError(f"{checkpoint} has no {MANIFEST}; it is not a whole checkpoint")
    try:
        manifest = json.loads(manifest_path.read_text())
        files, step = dict(manifest["files"]), int(manifest["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{manifest_path} is damaged: {error}") from None
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{checkpoint} lacks {name}")
        if path.stat().st_size != expected["size"]:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, but {expected['size']} were written")
        if _sha256(path) != expected["sha256"]:
            raise ValueError(f"{path} is not what was written: its SHA-256 differs from the manifest's")
    return step


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*"))


def _write_manifest(checkpoint: Path, step: int) -> None:
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            _sync(path)
            files[str(path.relative_to(checkpoint))] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    manifest = checkpoint / MANIFEST
    manifest.write_text(json.dumps({"step": step, "files": files}, indent=2))
    _sync(manifest)
    _sync(checkpoint)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
