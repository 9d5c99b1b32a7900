"""Checkpoints that are whole or not there: staged, hashed, renamed into place.

A checkpoint is a folder `step-000100` whose `manifest.json`, written last, holds the size and SHA-256 of every file.
It holds safetensors and JSON, and nothing that could run code. All processes write, hash and verify, each its share.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError

from distill.loop.host import from_main_process, gather_on_host, on_any_process
from teachers.folder import file_digest, let_others_read, new_file, sync

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
BEST = "best.json"


Files = dict[str, dict[str, int | str]]


def save_checkpoint(directory: Path, step: int, keep: int, contents: Iterable[Callable[[Path], Path | None]]) -> bool:
    """Save a checkpoint, then remove all but the newest `keep` and the best. All processes call it.

    `contents` are functions that write a part of this process's share into a folder and return the file, if there is
    one; all processes have equally many, since a sharded state has to be gathered by all. False, with a warning, if a
    disk does not take it: then the earlier checkpoints are as they were.
    """
    staging, is_main = directory / f".staging-{step:06d}", PartialState().is_main_process
    failure = from_main_process(_attempt(partial(_make_empty, directory, staging)) if is_main else None)
    files: Files = {}
    for write in contents:
        if on_any_process(
            failure is not None
        ):  # so that the slowest disk is waited for here, not in the next gathering
            break
        failure = _attempt(partial(_write, write, staging, files))
    shares = gather_on_host((failure, files))
    if is_main:
        failure = next((failure for failure, _ in shares if failure is not None), None)
        if failure is None:
            files = {name: entry for _, files in shares for name, entry in files.items()}
            failure = _attempt(partial(_put_in_place, staging, directory, step, files))
        if failure is None:
            _prune(directory, keep)
        else:
            shutil.rmtree(staging, ignore_errors=True)
            logger.warning("the checkpoint of step %d could not be saved: %s; earlier ones stay", step, failure)
    return from_main_process(failure is None)


def newest_checkpoint(directory: Path) -> Path:
    """The newest checkpoint that is whole; raises FileNotFoundError where there is none. All processes call it."""
    for checkpoint in from_main_process(list(reversed(_checkpoints(directory)))):
        try:
            verify_checkpoint(checkpoint)
        except ValueError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
        else:
            return checkpoint
    raise FileNotFoundError(f"there is no whole checkpoint in {directory}")


def verify_checkpoint(checkpoint: Path) -> int:
    """The step of a checkpoint, after every file was compared with its manifest; raises ValueError if one differs.

    All processes call it, and each reads its share of the files.
    """
    state = PartialState()
    manifest = from_main_process(_manifest_or_mistake(checkpoint) if state.is_main_process else None)
    if isinstance(manifest, str):
        raise ValueError(manifest)
    share = list(manifest["files"].items())[state.process_index :: state.num_processes]
    mistakes = [mistake for name, entry in share if (mistake := _difference(checkpoint / name, entry))]
    for found in gather_on_host(mistakes):
        if found:
            raise ValueError(found[0])
    return manifest["step"]


def _manifest_or_mistake(checkpoint: Path) -> dict[str, Any] | str:
    try:
        return _read_manifest(checkpoint)
    except ValueError as error:
        return str(error)


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    manifest_path = checkpoint / MANIFEST
    if not manifest_path.is_file():
        raise ValueError(f"{checkpoint} has no {MANIFEST}; it is not a whole checkpoint")
    try:
        text = manifest_path.read_text()
        manifest = json.loads(text)
        step = int(manifest["step"])
        files = {name: {key: entry[key] for key in ("size", "sha256")} for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest_path} is damaged: {error}") from None
    if checkpoint.name != _folder(checkpoint.parent, step).name or text != _manifest(step, files):
        raise ValueError(f"{manifest_path} is damaged: it is not the manifest of {checkpoint.name}")
    return {"step": step, "files": files}


def _difference(path: Path, expected: dict[str, int | str]) -> str | None:
    """In what a file is not the one that was written."""
    if not path.is_file():
        return f"{path.parent} lacks {path.name}"
    if path.stat().st_size != expected["size"]:
        return f"{path} has {path.stat().st_size} bytes, but {expected['size']} were written"
    if file_digest(path) != expected["sha256"]:
        return f"{path} is not what was written: its SHA-256 differs from the manifest's"
    return None


def mark_best(directory: Path, step: int, measure: str, value: float, keep: int) -> None:
    """Note that the checkpoint of this step is the best so far, which stays beside the newest `keep`."""
    best = json.dumps({"step": step, "measure": measure, "value": value})
    if failure := _attempt(partial(_write_best, directory, best)):
        logger.warning("that the checkpoint of step %d is the best could not be noted: %s", step, failure)
    _prune(directory, keep)


def _write_best(directory: Path, best: str) -> None:
    with new_file(directory / BEST) as staging:
        staging.write_text(best)


def best_checkpoint(directory: Path) -> tuple[Path, str, float] | None:
    """The checkpoint that was marked as the best, the measure and its value; None where none was."""
    try:
        best = json.loads((directory / BEST).read_text())
        return _folder(directory, best["step"]), best["measure"], best["value"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s) and counts for nothing", directory / BEST, error)
        return None


def _prune(directory: Path, keep: int) -> None:
    best = best_checkpoint(directory)
    for old in _checkpoints(directory)[:-keep]:
        if best is None or old != best[0]:
            shutil.rmtree(old, ignore_errors=True)  # what cannot be removed must not end the run


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def has_checkpoints(directory: Path) -> bool:
    """Whether there is any checkpoint, whole or not."""
    return bool(_checkpoints(directory))


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-[0-9]*"), key=step_of)


def _folder(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}"


def _attempt(work: Callable[[], object]) -> str | None:
    """What a disk, or the library that writes to it, has against it."""
    try:
        work()
    except (OSError, SafetensorError) as error:
        return str(error)
    return None


def _make_empty(directory: Path, staging: Path) -> None:
    for leftover in directory.glob(".staging-*"):
        shutil.rmtree(leftover)
    staging.mkdir(parents=True)


def _write(write: Callable[[Path], Path | None], staging: Path, files: Files) -> None:
    """Write a part, and hash it while the system has it in memory still."""
    path = write(staging)
    if path is not None:
        let_others_read(path)
        sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": file_digest(path)}


def _put_in_place(staging: Path, directory: Path, step: int, files: Files) -> None:
    for name in files:
        if not (staging / name).is_file():
            raise OSError(
                f"{staging / name} is not to be seen from the main process; all machines need one output folder"
            )
    manifest = staging / MANIFEST
    manifest.write_text(_manifest(step, files))
    sync(manifest)
    sync(staging)
    final = _folder(directory, step)
    if final.exists():  # damaged, or the run would have gone on from there
        shutil.rmtree(final)
    os.replace(staging, final)
    sync(directory)


def _manifest(step: int, files: Files) -> str:
    return json.dumps({"step": step, "files": dict(sorted(files.items()))}, indent=2)
