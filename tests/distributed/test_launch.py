"""Jobs as users run them: `accelerate launch --num_processes 2 --cpu`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def launch(tmp_path, name, *overrides, num_processes=2):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(num_processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [str(ROOT / "scripts" / "train_student.py"), f"teacher={tmp_path / 'teacher'}"]
    command += [f"output={tmp_path / name}", "training.num_steps=8", "training.batch_size=8", "training.tracker=none"]
    command += ["training.log_every=1", "training.checkpoint_every=2", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finish(process):
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def state(tmp_path, name, step=8):
    checkpoint = tmp_path / name / "checkpoints" / f"step-{step:06d}"
    files = ["model.safetensors", "model_1.safetensors", "averaged/diffusion_pytorch_model.safetensors"]
    return [load_file(checkpoint / file) for file in files]


def num_processes_of(tmp_path, name):
    """Accelerate saves the random state of each process."""
    return len(list((tmp_path / name / "checkpoints" / "step-000008").glob("random_states_*.pkl")))


def furthest(first, second):
    pairs = zip(state_tensors(first), state_tensors(second), strict=True)
    return max((one - other).abs().max().item() for one, other in pairs)


def state_tensors(state):
    return [tensor for weights in state for _, tensor in sorted(weights.items())]


def steps(tmp_path, name):
    path = tmp_path / name / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def saved_teacher(teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")


@pytest.mark.usefixtures("saved_teacher")
def test_two_processes_equal_one_and_a_killed_run_resumes_bitwise(tmp_path):
    one, two = launch(tmp_path, "one", num_processes=1), launch(tmp_path, "two")
    assert finish(one)[0] == finish(two)[0] == 0
    assert num_processes_of(tmp_path, "one") == 1
    assert num_processes_of(tmp_path, "two") == 2
    assert furthest(state(tmp_path, "one"), state(tmp_path, "two")) < 1e-5

    # Kill the run without warning once its second checkpoint is there, then go on.
    killed = launch(tmp_path, "killed", "training.log_every=1")
    wait_for(killed, lambda: list((tmp_path / "killed" / "checkpoints").glob("step-00000[4-6]")))
    os.killpg(killed.pid, signal.SIGKILL)
    finish(killed)
    status, errors = finish(launch(tmp_path, "killed", "training.resume=true"))
    assert status == 0, errors
    assert steps(tmp_path, "killed") == list(range(1, 9))
    assert all(map(torch.equal, *map(state_tensors, (state(tmp_path, "two"), state(tmp_path, "killed")))))


@pytest.mark.usefixtures("saved_teacher")
def test_a_signal_saves_and_ends_the_run_on_all_processes(tmp_path):
    process = launch(tmp_path, "run", "training.num_steps=100000", "training.checkpoint_every=100000")
    wait_for(process, lambda: len(steps(tmp_path, "run")) >= 3)
    os.killpg(process.pid, signal.SIGTERM)  # as a terminal or a scheduler does
    finish(process)
    checkpoints = list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert len(checkpoints) == 1
    assert int(checkpoints[0].name.removeprefix("step-")) >= 3


@pytest.mark.usefixtures("saved_teacher")
def test_a_mistake_is_one_line_and_loses_nothing(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").touch()
    status, errors = finish(launch(tmp_path, "run"))
    assert status != 0
    assert errors.count("error: the output folder") == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious"]
