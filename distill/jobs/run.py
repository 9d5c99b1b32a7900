"""How every job begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from distill.config import to_yaml
from distill.loop.accelerator import make_accelerator
from distill.loop.host import from_main_process
from distill.loop.signals import STOP_FILE
from teachers.folder import new_file

CONFIG = "config.yaml"


def open_run(job: Any) -> tuple[Accelerator, Path]:
    """The Accelerator of a job, and its output folder, claimed, with the job's settings in config.yaml.

    A ValueError, on all processes, where the folder holds something else.
    """
    output = Path(job.output)
    accelerator = make_accelerator(job.training, output)
    if mistake := from_main_process(_claim(output, job) if accelerator.is_main_process else None):
        raise ValueError(mistake)
    return accelerator, output


def _claim(output: Path, job: Any) -> str | None:
    """Make the folder the job's, unless something is wrong with it, which is returned."""
    if mistake := claim_mistake(output, job.training.resume):
        return mistake
    output.mkdir(parents=True, exist_ok=True)
    (output / STOP_FILE).unlink(missing_ok=True)
    with new_file(output / CONFIG) as staging:
        staging.write_text(to_yaml(job))
    return None


def claim_mistake(output: Path, resume: bool) -> str | None:
    """Why a run must not write into a folder; nothing is ever overwritten. With `resume` it may be a run's."""
    seen = [path for path in output.iterdir() if not path.name.startswith(".")] if output.is_dir() else []
    if not output.exists() or (output.is_dir() and not seen):  # hidden is what a process that died had begun
        return None
    if not resume:
        return (
            f"the output folder {output} is not empty; name another one, remove it, or go on with training.resume=true"
        )
    if not (output / CONFIG).is_file():
        return f"{output} is not the folder of a run, which could be gone on with: it has no {CONFIG}"
    return None
