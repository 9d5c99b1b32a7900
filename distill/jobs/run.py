"""How every job begins, and what it may go on with."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from distill.config import load_config, to_yaml
from distill.loop.accelerator import make_accelerator
from distill.loop.checkpoint import has_checkpoints
from distill.loop.host import by_main_process
from distill.loop.lines import read_lines
from distill.loop.signals import STOP_FILE
from distill.loop.trainer import CHECKPOINTS, METRICS, SPEED, TRACKER
from teachers.folder import file_digest, new_file
from teachers.sharing import hold

CONFIG, SAMPLES = "config.yaml", "samples"
MARK = ".run"  # the SHA-256 of the settings that a run was begun with here, until it has saved what it learnt
BEFORE_A_CHECKPOINT = {CONFIG, STOP_FILE, CHECKPOINTS, METRICS, SPEED, TRACKER, SAMPLES}

# What a run may go on with another value of, sections whole: how fast and how long it learns, how it is split up,
# watched and saved, and where things lie that are known by their contents. All else makes it another run.
MAY_CHANGE = (
    "output",
    "data.name",
    "tokens",
    "text_encoder",
    "teacher",
    "prompts",
    "monitor",
    "scoring_clip",
    "alarms",
    "sampler",
    "method.auxiliary_learning_rate",
    "method.lowest_token_entropy",
    "method.lowest_unique_tokens",
    "objective.lowest_perplexity",
    "training.num_steps",
    "training.max_steps",
    "training.learning_rate",
    "training.learning_rate_schedule",
    "training.warmup_steps",
    "training.max_grad_norm",
    "training.gradient_accumulation_steps",
    "training.gradient_checkpointing",
    "training.compile",
    "training.log_every",
    "training.evaluate_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.keep_best",
    "training.max_nonfinite_steps",
    "training.tracker",
    "training.resume",
)


def open_run(job: Any, prepared: Collection[str] = ()) -> tuple[Accelerator, Path]:
    """The Accelerator of a job, and its output folder, which nobody else may work in until this process ends.

    A run that has made no checkpoint is begun anew, whatever its settings were, if the folder holds nothing but what
    it left; `prepared` names what this job puts there before its first step. Any other is left as it is until
    `note_settings`. A ValueError, on all processes, where the folder holds something else, or a run of settings that
    must not change.
    """
    output = Path(job.output)
    accelerator = make_accelerator(job.training, output)
    by_main_process(lambda: _claim(output, job, BEFORE_A_CHECKPOINT | set(prepared)))
    return accelerator, output


def note_settings(job: Any) -> None:
    """Write down the settings of a run that nothing has refused: those that it goes on with. All processes call it."""
    by_main_process(lambda: _write_settings(job))


def note_saved(job: Any) -> None:
    """Note that a checkpoint was made: also without it the run is not begun anew. All processes call it."""
    by_main_process(lambda: (Path(job.output) / MARK).unlink(missing_ok=True))


def _claim(output: Path, job: Any, begun: set[str]) -> None:
    _goes_on(output, job, begun)  # so that a refusal leaves no lock behind
    output.mkdir(parents=True, exist_ok=True)
    locked = hold(output)
    if locked is False:
        raise ValueError(f"another process is at work in {output}; wait for it, or name another output folder")
    # Only now is it certain: until now another process may have been at work. Without locks one may be still.
    goes_on = _goes_on(output, job, begun, alone=bool(locked))
    (output / STOP_FILE).unlink(missing_ok=True)
    if not goes_on:
        for path in (output / name for name in begun - {CONFIG, CHECKPOINTS}):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        (output / CONFIG).unlink(missing_ok=True)  # last: with its mark it says whose the rest is
        with new_file(output / MARK) as staging:
            staging.write_text(hashlib.sha256(to_yaml(job).encode()).hexdigest())
        _write_settings(job)


def _goes_on(output: Path, job: Any, begun: set[str], alone: bool = True) -> bool:
    """Whether a folder's run is gone on with, and not begun, or begun anew; a ValueError where none of these may be."""
    names = set(_seen(output)) if output.is_dir() else set()
    if not names and (output.is_dir() or not output.exists()):
        return False
    if alone and _can_start_again(output, names, job, begun):
        return False
    if not job.training.resume or not output.is_dir():
        raise ValueError(
            f"the output folder {output} is not empty; name another one, remove it, or, if it is a run's, go on with "
            "training.resume=true"
        )
    if CONFIG not in names:
        raise ValueError(f"{output} is not the folder of a run, which could be gone on with: it has no {CONFIG}")
    if not has_checkpoints(output / CHECKPOINTS) and not _is_as_written(output, job):
        raise ValueError(
            f"{output} is not the folder of a run, which could be gone on with: it has no checkpoint, and no run wrote "
            f"its {CONFIG}; name another output folder"
        )
    _check_changes(output, load_config(type(job), output / CONFIG), job)
    return True


def _can_start_again(output: Path, names: set[str], job: Any, begun: set[str]) -> bool:
    """Whether a folder holds nothing but what a run left there that never came to its first checkpoint."""
    mark = output / MARK
    if not mark.is_file() or CONFIG not in names or mark.read_text() != file_digest(output / CONFIG):
        return False
    if names - begun or ((output / CHECKPOINTS).is_dir() and _seen(output / CHECKPOINTS)):
        return False
    lines, was = read_lines(output / METRICS), load_config(type(job), output / CONFIG).training
    best = was.evaluate_every if was.keep_best else 0
    saves = [step for step in (was.checkpoint_every, best, was.num_steps, was.max_steps) if step]
    return not lines or lines[-1]["step"] < min(saves)  # or it had checkpoints, which somebody has removed


def _seen(folder: Path) -> list[str]:
    """The names in a folder; hidden is what a process that died had begun."""
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def _is_as_written(output: Path, job: Any) -> bool:
    """Whether a folder's settings are whole and word for word as a run writes them, and nobody's own."""
    try:
        return to_yaml(load_config(type(job), output / CONFIG)) == (output / CONFIG).read_text()
    except ValueError:
        return False


def _check_changes(output: Path, before: Any, now: Any) -> None:
    """A ValueError where a setting differs that must not."""
    was, now = _by_name(yaml.safe_load(to_yaml(before))), _by_name(yaml.safe_load(to_yaml(now)))
    changed = [
        f"{name}={was.get(name)}, not {now.get(name)}"
        for name in was | now
        if was.get(name) != now.get(name) and not any(f"{name}.".startswith(f"{free}.") for free in MAY_CHANGE)
    ]
    if changed:
        raise ValueError(
            f"the run in {output} was begun with {'; '.join(changed)}. It can go on with its own settings alone; name "
            "another output folder for others"
        )


def _by_name(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their whole names, `training.seed` and so on."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _by_name(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _write_settings(job: Any) -> None:
    with new_file(Path(job.output) / CONFIG) as staging:
        staging.write_text(to_yaml(job))
