"""Kill -9 at random moments, and at every moment of a save."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from distill.loop.checkpoint import newest_checkpoint, save_checkpoint, verify_checkpoint
from distill.loop.state import save_share

ROOT = Path(__file__).parents[2]


def killed_at_random(folder, kills):
    command = [sys.executable, "tests/distributed/kills.py", str(folder), "--kills", str(kills)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def check(result, kills):
    assert result["kills"] >= kills
    assert result["runs_that_differ"] == 0
    assert result["steps_lost"] == 0  # of those that were saved


def test_a_run_that_is_killed_ends_as_if_it_had_not_been(tmp_path):
    check(killed_at_random(tmp_path / "runs", 10), 10)


@pytest.mark.slow
def test_two_hundred_kills(tmp_path):
    """`pytest -m slow -k two_hundred -s` prints what became of the runs."""
    result = killed_at_random(tmp_path / "runs", 200)
    print(f"\n{result}")
    check(result, 200)
    assert result["in_a_save"] >= 10


def contents(step):
    yield partial(save_share, "model", {"weights": torch.full((10,), float(step))}, 0, 1)
    yield partial(write_counters, step)


def write_counters(step, folder):
    (folder / "trainer.json").write_text(json.dumps({"step": step}))
    return folder / "trainer.json"


def die_at(call, directory):
    """Save a second checkpoint, in which the process kills itself before its `call`-th step on the file system."""
    steps, calls = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir"), 0

    def count(event, arguments):
        nonlocal calls
        if event in steps and str(directory) in " ".join(map(str, arguments)):
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    save_checkpoint(directory, 2, 1, contents(2))


def test_a_kill_before_any_step_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    fork, steps_seen = multiprocessing.get_context("fork"), set()
    for call in range(1, 100):
        directory = tmp_path / str(call)
        save_checkpoint(directory, 1, 1, contents(1))
        process = fork.Process(target=partial(die_at, call, directory))
        process.start()
        process.join()
        newest = newest_checkpoint(directory)
        steps_seen.add(verify_checkpoint(newest))
        save_checkpoint(directory, 3, 1, contents(3))
        assert [path.name for path in directory.iterdir()] == ["step-000003"]
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert call > 15
    assert steps_seen == {1, 2}
