"""What a run learns from: where it lies, whatever folder a command is started in, and that it is still the same."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from teachers.component import weights_digest
from teachers.data import ImageData
from teachers.folder import new_file
from teachers.pipeline import MaskedDiffusionPipeline
from teachers.sources.columns import natural_order
from teachers.tokenizers.token_cache import TokenCache

logger = logging.getLogger(__name__)

SOURCES = "sources.json"  # in the folder of a run
FROZEN = ("denoiser", "tokenizer", "text_encoder")  # what a student has of its teacher


def sources_of(teacher: MaskedDiffusionPipeline, name: str, prompts: str) -> dict[str, Any]:
    """Where teacher and prompts lie, by whole paths if on this machine, and the SHA-256 of the teacher's weights."""
    parts = {part: getattr(teacher, part) for part in FROZEN}
    weights = {part: weights_digest(network) for part, network in parts.items() if network is not None}
    return {"teacher": _whole(name), "prompts": _whole(prompts), "weights": weights}


def data_sources(data: ImageData | TokenCache, captions: str = "") -> dict[str, Any]:
    """What is known of data wherever it lies: classes, labels (SHA-256), the tokens' tokenizer, the captions' key."""
    return {
        "num_images": len(data.labels),
        "class_names": data.class_names,
        "labels": hashlib.sha256(data.labels.numpy().tobytes()).hexdigest(),
        "tokenizer": weights_digest(data.tokenizer) if isinstance(data, TokenCache) else "",  # else the run's own
        "captions": captions,
    }


def note_sources(run: Path, sources: dict[str, Any]) -> None:
    with new_file(run / SOURCES) as staging:
        staging.write_text(json.dumps(sources, indent=2))


def check_sources(run: Path, found: dict[str, Any]) -> None:
    """A ValueError where the teacher is not the one that a run was begun with."""
    known = _read(run).get("weights")
    if known is None:
        logger.warning("%s has no %s: whether %s is still its teacher is not known", run, SOURCES, found["teacher"])
        return
    if changed := [part for part in FROZEN if known.get(part) != found["weights"].get(part)]:
        raise ValueError(
            f"{found['teacher']} is not the teacher of {run}: another {' and '.join(changed)} (by SHA-256, which "
            f"{run / SOURCES} has); name the one that the run was begun with"
        )


def check_data(run: Path, found: dict[str, Any], labels_are_saved: bool) -> None:
    """A ValueError where the data are not those that a run was begun with.

    Of a run that did not note them it is known that classes were numbered in the order of their names as text, unless
    the labels were saved with the tokens.
    """
    known, names = _read(run), found["class_names"]
    if not known:
        if not labels_are_saved and names != sorted(names) and names == sorted(names, key=natural_order):
            raise ValueError(
                f"{run} was begun when classes were numbered in the order of their names as text, {sorted(names)[:3]}; "
                f"now that is {names[:3]}, and its labels would be of other classes; begin in another output folder"
            )
        logger.warning("%s has no %s: whether its data are still the same is not known", run, SOURCES)
    elif changed := [part for part in found if known.get(part) != found[part]]:
        raise ValueError(
            f"the data are not those that {run} was begun with: another {' and '.join(changed)} (which "
            f"{run / SOURCES} has); name the same, or another output folder"
        )


def locate(run: Path, source: str, name: str) -> str:
    """Where the run's `teacher` or `prompts` of the name in its settings lie now: as noted, or as named."""
    noted = _read(run).get(source, name)
    return next((place for place in (noted, name) if Path(place).exists()), noted)


def _read(run: Path) -> dict[str, Any]:
    """What was noted; nothing of a run that was begun before runs did."""
    return json.loads((run / SOURCES).read_text()) if (run / SOURCES).is_file() else {}


def _whole(name: str) -> str:
    return str(Path(name).resolve()) if name and Path(name).exists() else name  # else a hub id
