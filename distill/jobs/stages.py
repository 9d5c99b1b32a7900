"""A job of several stages, each of which is skipped where its result is there."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from teachers.folder import new_file


class Stages:
    """Runs stages and keeps, in `seconds.json` of the folder, how long they took, over all interruptions."""

    def __init__(self, output: Path):
        output.mkdir(parents=True, exist_ok=True)
        self._file = output / "seconds.json"

    @property
    def seconds(self) -> dict[str, float]:
        return json.loads(self._file.read_text()) if self._file.exists() else {}

    def run(self, name: str, result: Path, work: Callable[[], None]) -> None:
        """Do the work unless its result, a file or folder, is there."""
        if result.exists():
            print(f"== {name}: {result} is there", flush=True)
            return
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        work()
        seconds = self.seconds
        seconds[name] = seconds.get(name, 0) + time.perf_counter() - start
        with new_file(self._file) as staging:
            staging.write_text(json.dumps(seconds))
        print(f"== {name}: {seconds[name]:.0f} s", flush=True)


def launch(script: Path, config: Path, output: Path, *overrides: str) -> None:
    """`accelerate launch` of a training script: on the GPU if there is one, else on two CPU processes with a core each.

    Goes on from the checkpoints in the output folder, if there are any.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = dict(os.environ)
    if torch.cuda.is_available():
        command += ["--num_processes", "1"]
    else:
        command += ["--cpu", "--num_processes", str(min(2, os.cpu_count() or 1))]
        command += ["--num_cpu_threads_per_process", "1"]
        environment["OMP_NUM_THREADS"] = "1"
    command += [str(script), "--config", str(config), f"output={output}"]
    command += ["training.resume=true", *overrides]
    print("$ accelerate launch " + " ".join(command[3:]), flush=True)
    call(command, environment)


def call(command: list[str], environment: dict[str, str] | None = None) -> None:
    """Run a command; a ValueError where it fails, of which it has said why."""
    if status := subprocess.run(command, env=environment).returncode:
        raise ValueError(f"a stage failed (status {status}), as said above: {shlex.join(command)}")
