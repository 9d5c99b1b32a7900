"""Kill -9 at random moments, and at every moment of a save."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def result_of(program, folder, *arguments):
    command = [sys.executable, f"tests/distributed/{program}", str(folder), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def check(result, kills):
    assert result["kills"] >= kills
    assert result["runs_that_differ"] == 0
    assert result["steps_lost"] == 0  # of those that were saved


def test_a_run_that_is_killed_ends_as_if_it_had_not_been(tmp_path):
    check(result_of("kills.py", tmp_path / "runs", "--kills", "10"), 10)


@pytest.mark.slow
def test_two_hundred_kills(tmp_path):
    """`pytest -m slow -k two_hundred -s` prints what became of the runs."""
    result = result_of("kills.py", tmp_path / "runs", "--kills", "200")
    print(f"\n{result}")
    check(result, 200)
    assert result["in_a_save"] >= 10


def test_a_kill_before_any_step_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    result = result_of("moments.py", tmp_path / "saves")
    assert result["moments"] > 15
    assert set(result["steps_seen"]) == {1, 2}
