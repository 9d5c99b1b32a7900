"""What a run learns from: where it lies, whatever folder a command is started in, and that it is still the same."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from teachers.component import weights_digest
from teachers.folder import new_file
from teachers.pipeline import MaskedDiffusionPipeline

logger = logging.getLogger(__name__)

SOURCES = "sources.json"  # in the folder of a run
FROZEN = ("denoiser", "tokenizer", "text_encoder")  # what a student has of its teacher


def sources_of(teacher: MaskedDiffusionPipeline, name: str, prompts: str) -> dict[str, Any]:
    """Where teacher and prompts lie, by whole paths if on this machine, and the SHA-256 of the teacher's weights."""
    parts = {part: getattr(teacher, part) for part in FROZEN}
    weights = {part: weights_digest(network) for part, network in parts.items() if network is not None}
    return {"teacher": _whole(name), "prompts": _whole(prompts), "weights": weights}


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


def locate(run: Path, source: str, name: str) -> str:
    """Where the run's `teacher` or `prompts` of the name in its settings lie now: as noted, or as named."""
    noted = _read(run).get(source, name)
    return next((place for place in (noted, name) if Path(place).exists()), noted)


def _read(run: Path) -> dict[str, Any]:
    """What was noted; nothing of a run that was begun before runs did."""
    return json.loads((run / SOURCES).read_text()) if (run / SOURCES).is_file() else {}


def _whole(name: str) -> str:
    return str(Path(name).resolve()) if name and Path(name).exists() else name  # else a hub id
