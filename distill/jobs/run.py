"""How every job begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from distill.config import to_yaml
from distill.loop.accelerator import make_accelerator
from distill.loop.checkpoint import claim_output
from teachers.folder import new_file


def open_run(job: Any) -> tuple[Accelerator, Path]:
    """The Accelerator of a job, and its output folder, claimed, with the job's settings in config.yaml."""
    output = Path(job.output)
    accelerator = make_accelerator(job.training, output)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            claim_output(output, job.training.resume)
            with new_file(output / "config.yaml") as staging:
                staging.write_text(to_yaml(job))
    return accelerator, output
