"""Checkpoints that are whole or not there: staged, hashed, renamed into place.

A checkpoint is a folder `step-000100` whose `manifest.json`, written last, holds the size and SHA-256 of every file.
It holds safetensors and JSON, and nothing that could run code.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from teachers.folder import file_digest, new_file, sync

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
BEST = "best.json"


def save_checkpoint(
    accelerator: Accelerator, directory: Path, step: int, keep: int, contents: Iterable[Callable[[Path], object]]
) -> bool:
    """Save a checkpoint, then remove all but the newest `keep` and the best. All processes call it.

    `contents` are functions that write parts of it into a folder: every process draws them (a sharded state has to be
    gathered by all), the main one calls them. False, with a warning, if the disk does not take it: then the earlier
    checkpoints are as they were.
    """
    staging, failure = directory / f".staging-{step:06d}", None
    if accelerator.is_main_process:
        failure = _attempt(partial(_make_empty, directory, staging))
    for write in contents:
        if accelerator.is_main_process and failure is None:
            failure = _attempt(partial(write, staging))
    if accelerator.is_main_process and failure is None:
        failure = _attempt(partial(_put_in_place, staging, directory, step))
    if failure is not None:
        shutil.rmtree(staging, ignore_errors=True)
        logger.warning("the checkpoint of step %d could not be saved: %s; earlier ones stay", step, failure)
    elif accelerator.is_main_process:
        _prune(directory, keep)
    return broadcast_object_list([failure is None])[0]


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
        text = manifest_path.read_text()
        manifest = json.loads(text)
        step = int(manifest["step"])
        files = {name: {key: entry[key] for key in ("size", "sha256")} for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest_path} is damaged: {error}") from None
    if checkpoint.name != _folder(checkpoint.parent, step).name or text != _manifest(step, files):
        raise ValueError(f"{manifest_path} is damaged: it is not the manifest of {checkpoint.name}")
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{checkpoint} lacks {name}")
        if path.stat().st_size != expected["size"]:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, but {expected['size']} were written")
        if file_digest(path) != expected["sha256"]:
            raise ValueError(f"{path} is not what was written: its SHA-256 differs from the manifest's")
    return step


def mark_best(directory: Path, step: int, measure: str, value: float, keep: int) -> None:
    """Note that the checkpoint of this step is the best so far, which stays beside the newest `keep`."""
    with new_file(directory / BEST) as staging:
        staging.write_text(json.dumps({"step": step, "measure": measure, "value": value}))
    _prune(directory, keep)


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


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-[0-9]*"), key=lambda folder: int(folder.name.removeprefix("step-")))


def _folder(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}"


def _attempt(work: Callable[[], object]) -> Exception | None:
    try:
        work()
    except (OSError, SafetensorError) as error:
        return error
    return None


def _make_empty(directory: Path, staging: Path) -> None:
    for leftover in directory.glob(".staging-*"):
        shutil.rmtree(leftover)
    staging.mkdir(parents=True)


def _put_in_place(staging: Path, directory: Path, step: int) -> None:
    files: dict[str, dict[str, int | str]] = {}
    for path in sorted(staging.rglob("*")):
        if path.is_file():
            sync(path)
            files[str(path.relative_to(staging))] = {"size": path.stat().st_size, "sha256": file_digest(path)}
    manifest = staging / MANIFEST
    manifest.write_text(_manifest(step, files))
    for path in (manifest, *(folder for folder in staging.rglob("*") if folder.is_dir()), staging):
        sync(path)
    final = _folder(directory, step)
    if final.exists():  # damaged, or the run would have gone on from there
        shutil.rmtree(final)
    os.replace(staging, final)
    sync(directory)


def _manifest(step: int, files: dict[str, dict[str, int | str]]) -> str:
    return json.dumps({"step": step, "files": files}, indent=2)


def claim_output(output: Path, resume: bool) -> None:
    """Make the output folder of a new run, or see that there is a run to resume; nothing is ever overwritten."""
    if resume:
        newest_checkpoint(output / "checkpoints")
    elif output.exists() and any(output.iterdir()):
        raise ValueError(
            f"the output folder {output} is not empty; name another one, remove it, or go on with training.resume=true"
        )
    else:
        output.mkdir(parents=True, exist_ok=True)
