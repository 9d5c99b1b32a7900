"""Kill a distillation without warning, again and again, and look at what is left.

    python tests/distributed/kills.py FOLDER [--kills 200] [--seed 0]

Each life of a run is forked from a process that has imported everything and computed nothing, so that it starts at
once. A run that was killed is started again until it ends; then its last checkpoint has to be, to the bit, that of a
run that was let be. The last line of stdout is the result as JSON.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch

from distill.config import load_config
from distill.jobs.student import StudentJob, train_student
from distill.loop.checkpoint import newest_checkpoint
from teachers import MaskedDiffusionPipeline, MaskGITSampler, MaskGITTransformer, PatchTokenizer

NUM_STEPS = 120


def make_teacher(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = PatchTokenizer.fit(torch.rand(64, 1, 8, 8), patch_size=2, codebook_size=16)
    denoiser = MaskGITTransformer(16, 10, (4, 4), hidden_size=16, num_layers=1, num_attention_heads=2, mlp_size=32)
    MaskedDiffusionPipeline(denoiser.eval(), tokenizer, MaskGITSampler()).save_pretrained(folder)


def distil(folder: Path, run: Path) -> None:
    resume = any((run / "checkpoints").glob("step-*"))
    if not resume:
        shutil.rmtree(run, ignore_errors=True)  # as distill.jobs.stages.launch does
    settings = [f"teacher={folder / 'teacher'}", f"output={run}", f"training.resume={str(resume).lower()}"]
    settings += [f"training.num_steps={NUM_STEPS}", "training.batch_size=8", "training.log_every=1"]
    settings += ["training.checkpoint_every=2", "training.tracker=none", "initial.embedding_noise=0.1"]
    train_student(load_config(StudentJob, overrides=settings))


def fork(work, log: Path) -> int:
    """The process that does the work, its output going into the log; it exits with 1 where the work fails."""
    process = os.fork()
    if process:
        return process
    with log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        status = 0
        try:
            torch.set_num_threads(1)
            work()
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stderr.flush()
        sys.stdout.flush()
    os._exit(status)


def finish(work, log: Path) -> None:
    _, status = os.waitpid(fork(work, log), 0)
    if status:
        raise SystemExit(f"a run failed by itself; see {log}:\n{log.read_text()[-2000:]}")


def live_for(seconds: float, work, log: Path) -> bool:
    """Let the work run for a while, then kill it; False if it had ended before."""
    process, deadline = fork(work, log), time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            if status:
                raise SystemExit(f"a run failed by itself; see {log}:\n{log.read_text()[-2000:]}")
            return False
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return True


def newest_step(run: Path) -> int:
    try:
        return int(newest_checkpoint(run / "checkpoints").name.removeprefix("step-"))
    except FileNotFoundError:
        return 0


def everything(run: Path) -> dict[str, bytes]:
    """All files of the last checkpoint, and the metrics."""
    checkpoint = run / "checkpoints" / f"step-{NUM_STEPS:06d}"
    files = {str(path.relative_to(run)): path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    return files | {"metrics.jsonl": (run / "metrics.jsonl").read_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a distillation again and again.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder, generator = arguments.folder.absolute(), random.Random(arguments.seed)
    folder.mkdir(parents=True)
    log = folder / "log.txt"
    finish(partial(make_teacher, folder / "teacher"), log)
    start = time.monotonic()
    finish(partial(distil, folder, folder / "reference"), log)
    whole, expected = time.monotonic() - start, everything(folder / "reference")

    result = {
        "kills": 0,
        "in_a_save": 0,
        "lives_without_progress": 0,
        "runs": 0,
        "runs_that_differ": 0,
        "steps_lost": 0,
    }
    while result["kills"] < arguments.kills:
        run = folder / f"run-{result['runs']}"
        newest = 0
        while live_for(generator.uniform(0.05, 0.4) * whole, partial(distil, folder, run), log):
            result["kills"] += 1
            result["in_a_save"] += any((run / "checkpoints").glob(".staging-*"))
            before, newest = newest, newest_step(run)
            result["steps_lost"] += max(0, before - newest)
            result["lives_without_progress"] += newest == before
        result["runs"] += 1
        result["runs_that_differ"] += everything(run) != expected
        shutil.rmtree(run)
        print(result, flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
