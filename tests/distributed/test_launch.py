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

from distill.loop.checkpoint import newest_checkpoint
from distill.loop.state import SavedTensors
from teachers import MaskedDiffusionPipeline

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train_student.py"


def launch(tmp_path, name, *overrides, num_processes=2, environment=None, script=SCRIPT, of_a_teacher=True):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(num_processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [str(script)] + [f"teacher={tmp_path / 'teacher'}"] * of_a_teacher
    command += [f"output={tmp_path / name}", "training.num_steps=8", "training.batch_size=8", "training.tracker=none"]
    command += ["training.log_every=1", "training.checkpoint_every=2", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (environment or {})
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(process, condition):
    deadline = time.monotonic() + 120
    try:
        while not condition():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
    except AssertionError:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def finish(process):
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def state(tmp_path, name, step=8):
    checkpoint = tmp_path / name / "checkpoints" / f"step-{step:06d}"
    saved = [SavedTensors(checkpoint, file) for file in ("student", "auxiliary", "student.adam", "averaged")]
    return [{name: tensors.read(name) for name in sorted(tensors.keys())} for tensors in saved]


def furthest(first, second):
    pairs = zip(state_tensors(first), state_tensors(second), strict=True)
    return max((one - other).abs().max().item() for one, other in pairs)


def state_tensors(state):
    return [tensor for weights in state for _, tensor in sorted(weights.items())]


def metrics(tmp_path, name):
    path = tmp_path / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps(tmp_path, name):
    return [line["step"] for line in metrics(tmp_path, name)]


def furthest_metric(first, second):
    """The largest relative difference of any metric at any step, but of that which each process has of its own."""
    return max(
        abs(one[key] - other[key]) / max(abs(one[key]), 1e-3)
        for one, other in zip(first, second, strict=True)
        for key in one
        if key != "unique_tokens"
    )


@pytest.fixture
def saved_teacher(teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
GOLDEN = Path(__file__).parent / "golden_trajectory.json"


@pytest.mark.usefixtures("saved_teacher")
def test_every_way_of_sharing_the_work_gives_the_same_run(tmp_path):
    """1 process x 8 == 2 x 4 == 1 x 2 parts of 4, under DDP and FSDP2; and the run that was recorded.

    `pytest -k every_way -s` prints how far they are apart.
    """
    monitored = ["monitor.name=digits", "training.evaluate_every=8", "training.warmup_steps=0"]
    monitored += ["initial.embedding_noise=0.1"]
    launches = {
        "one": launch(tmp_path, "one", *monitored, num_processes=1),
        "two": launch(tmp_path, "two", *monitored),
        "parts": launch(tmp_path, "parts", *monitored, "training.gradient_accumulation_steps=2", num_processes=1),
        "sharded": launch(tmp_path, "sharded", *monitored, environment=FSDP2),
    }
    for name, process in launches.items():
        status, output = finish(process)
        assert status == 0, (name, output)
        assert ("FSDP2" in output, "DDP" in output) == (name == "sharded", name == "two")
    one = metrics(tmp_path, "one")
    assert max(line["divergence"] for line in one if "divergence" in line) > 1e-4
    for name in ("two", "parts", "sharded"):
        weights, lines = furthest(state(tmp_path, "one"), state(tmp_path, name)), metrics(tmp_path, name)
        print(f"\none process and {name}: weights {weights:.1e}, metrics {furthest_metric(one, lines):.1e} apart")
        assert weights < 2e-5
        assert furthest_metric(one, lines) < 1e-4
    golden = json.loads(GOLDEN.read_text())
    print(f"from the recorded run: {furthest_metric(golden, one):.1e}")
    assert furthest_metric(golden, one) < 1e-3  # other processors round otherwise


@pytest.mark.usefixtures("saved_teacher")
def test_adapters_are_shared_as_whole_networks_are(tmp_path):
    """They lie on the teacher's own parameters, which must stay whole and as they were."""
    settings = ["adapter_rank=2", "training.warmup_steps=0", "training.learning_rate=0.01"]
    launches = {
        "one": launch(tmp_path, "one", *settings, num_processes=1),
        "two": launch(tmp_path, "two", *settings),
        "sharded": launch(tmp_path, "sharded", *settings, environment=FSDP2),
    }
    for name, process in launches.items():
        status, output = finish(process)
        assert status == 0, (name, output)
    one = metrics(tmp_path, "one")
    assert max(line["divergence"] for line in one) > 1e-4
    for name in ("two", "sharded"):
        assert furthest(state(tmp_path, "one"), state(tmp_path, name)) < 2e-5
        assert furthest_metric(one, metrics(tmp_path, name)) < 1e-4


@pytest.mark.usefixtures("saved_teacher")
def test_a_run_goes_on_with_other_processes(tmp_path):
    """Four steps on two processes that shard, then four on one: as eight on one."""
    whole = launch(tmp_path, "whole", num_processes=1)
    assert finish(launch(tmp_path, "moved", "training.max_steps=4", environment=FSDP2))[0] == 0
    status, output = finish(launch(tmp_path, "moved", "training.resume=true", num_processes=1))
    assert status == 0, output
    assert finish(whole)[0] == 0
    assert steps(tmp_path, "moved") == list(range(1, 9))
    assert furthest(state(tmp_path, "whole"), state(tmp_path, "moved")) < 2e-5


@pytest.mark.usefixtures("saved_teacher")
@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["DDP", "FSDP2"])
def test_a_killed_run_resumes_bitwise(tmp_path, environment):
    whole = launch(tmp_path, "whole", environment=environment)
    killed = launch(tmp_path, "killed", environment=environment)
    # Kill the run without warning once its second checkpoint is there, then go on.
    wait_for(killed, lambda: list((tmp_path / "killed" / "checkpoints").glob("step-00000[4-6]")))
    os.killpg(killed.pid, signal.SIGKILL)
    finish(killed)
    assert finish(whole)[0] == 0
    status, output = finish(launch(tmp_path, "killed", "training.resume=true", environment=environment))
    assert status == 0, output
    assert steps(tmp_path, "killed") == list(range(1, 9))
    assert all(map(torch.equal, *map(state_tensors, (state(tmp_path, "whole"), state(tmp_path, "killed")))))


@pytest.mark.usefixtures("saved_teacher")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run_on_all_processes(tmp_path, number):
    process = launch(tmp_path, "run", "training.num_steps=100000", "training.checkpoint_every=100000")
    wait_for(process, lambda: len(steps(tmp_path, "run")) >= 3)
    os.killpg(process.pid, number)  # as a terminal or a scheduler does
    finish(process)
    checkpoints = list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert len(checkpoints) == 1
    assert int(checkpoints[0].name.removeprefix("step-")) >= 3


def torchrun(tmp_path, name, *overrides):
    """The launcher that `accelerate launch` starts processes with on GPUs: it has processes of its own, and a mind."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(SCRIPT), f"teacher={tmp_path / 'teacher'}", f"output={tmp_path / name}", "training.log_every=1"]
    command += ["training.batch_size=8", "training.num_steps=100000", "training.checkpoint_every=100000"]
    command += ["training.tracker=none", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.usefixtures("saved_teacher")
def test_a_signal_to_torch_s_launcher_alone_saves_and_ends_the_run(tmp_path):
    process = torchrun(tmp_path, "run")
    wait_for(process, lambda: len(steps(tmp_path, "run")) >= 3)
    process.send_signal(signal.SIGTERM)
    status, output = finish(process)
    assert status != 0  # it says what ended it
    assert "go on with training.resume=true" in output
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1


@pytest.mark.usefixtures("saved_teacher")
@pytest.mark.parametrize("start", [torchrun, launch], ids=["torchrun", "accelerate launch"])
def test_a_file_in_the_folder_stops_a_run_whatever_started_it(tmp_path, start):
    endless = ["training.num_steps=100000", "training.checkpoint_every=100000"]
    process = start(tmp_path, "run", *endless)
    wait_for(process, lambda: len(steps(tmp_path, "run")) >= 3)
    (tmp_path / "run" / "stop").touch()
    status, output = finish(process)
    assert status == 0, output
    checkpoint = newest_checkpoint(tmp_path / "run" / "checkpoints")
    files = {path.name for path in checkpoint.iterdir()}
    assert {"student-00000-of-00002.safetensors", "student-00001-of-00002.safetensors"} <= files
    step = int(checkpoint.name.removeprefix("step-"))
    status, output = finish(launch(tmp_path, "run", "training.resume=true", f"training.num_steps={step + 2}"))
    assert status == 0, output  # the file was for the run that it stopped
    assert steps(tmp_path, "run") == list(range(1, step + 3))


@pytest.mark.usefixtures("saved_teacher")
def test_shards_in_half_precision_learn_what_whole_networks_learn(tmp_path):
    """Gradients are added up in float32, or they would be 2^-8 apart; until rounding makes a token another one."""
    settings = ["training.mixed_precision=bf16", "training.warmup_steps=0", "method.guidance_scale=2"]
    settings += ["method.auxiliary_samples=fresh"]  # a forward of the student that no backward follows
    launches = {
        "whole": launch(tmp_path, "whole", *settings),
        "sharded": launch(tmp_path, "sharded", *settings, environment=FSDP2),
    }
    for name, process in launches.items():
        status, output = finish(process)
        assert status == 0, (name, output)
    whole, sharded = metrics(tmp_path, "whole"), metrics(tmp_path, "sharded")
    print(f"\nfirst step: {furthest_metric(whole[:1], sharded[:1]):.1e}, all: {furthest_metric(whole, sharded):.1e}")
    assert furthest_metric(whole[:1], sharded[:1]) < 1e-4
    assert furthest_metric(whole, sharded) < 0.1


def test_a_teacher_that_was_sharded_is_saved(tmp_path):
    settings = ["network={hidden_size: 16, num_layers: 1, num_attention_heads: 2, mlp_size: 32}"]
    settings += ["tokenizer.codebook_size=16", "training.num_steps=2"]
    script = ROOT / "scripts" / "train_teacher.py"
    status, output = finish(launch(tmp_path, "run", *settings, environment=FSDP2, script=script, of_a_teacher=False))
    assert status == 0, output
    assert len(MaskedDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")([3]).images) == 1


@pytest.mark.usefixtures("saved_teacher")
@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["DDP", "FSDP2"])
def test_a_fault_on_one_process_keeps_all_from_the_step(tmp_path, environment):
    """Where the second process alone has no finite loss neither takes the step; after three in a row both end."""
    faulty = environment | {"RANK_AT_FAULT": "1"}
    script = ROOT / "tests" / "distributed" / "faulty.py"

    def start(name, steps, *overrides):
        fault = faulty | {"FAULTY_STEPS": json.dumps(steps)}
        return launch(tmp_path, name, *overrides, environment=fault, script=script)

    runs = start("skips", [2, 5]), start("ends", [2, 3, 4], "training.max_nonfinite_steps=3")
    status, output = finish(runs[0])
    assert status == 0, output
    assert output.count("is not finite; skipped") == 2
    assert all(tensor.isfinite().all() for tensor in state_tensors(state(tmp_path, "skips")))
    updates = {tensor.item() for key, tensor in state(tmp_path, "skips")[2].items() if key.endswith(".step")}
    assert updates == {6}
    status, output = finish(runs[1])
    assert status != 0
    assert "3 updates in a row had no finite loss" in output


@pytest.mark.usefixtures("saved_teacher")
def test_an_evaluation_that_fails_on_one_process_costs_neither_a_step(tmp_path):
    environment = {"RANK_AT_FAULT": "1", "FAULTY_EVALUATIONS": "[4, 8]"}
    settings = ["monitor.name=digits", "training.evaluate_every=2"]
    script = ROOT / "tests" / "distributed" / "faulty.py"
    status, output = finish(launch(tmp_path, "run", *settings, environment=environment, script=script))
    assert status == 0, output
    assert output.count("failed: it has no images") == 2
    assert [line["step"] for line in metrics(tmp_path, "run") if "fd" in line] == [0, 2, 6]
    assert state(tmp_path, "run", step=8)


COUNT = "from distill.loop.launch import run_processes\nrun_processes(lambda: print('process', flush=True))"


def test_processes_are_as_many_as_the_launcher_s_file_or_command_line_says(tmp_path):
    (tmp_path / "count.py").write_text(COUNT)
    (tmp_path / "hub" / "accelerate").mkdir(parents=True)
    file = "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nuse_cpu: true\nnum_machines: 1\n"
    (tmp_path / "two.yaml").write_text(file + "num_processes: 2\n")
    (tmp_path / "hub" / "accelerate" / "default_config.yaml").write_text(file + "num_processes: 3\n")
    named, launcher = ["--config_file", str(tmp_path / "two.yaml")], ["-m", "accelerate.commands.launch"]
    runs = {}
    for expected, before in [
        (2, [*launcher, *named]),
        (3, launcher),  # the default file
        (1, [*launcher, *named, "--num_processes", "1"]),
        (1, [*launcher, "--cpu"]),  # the launcher leaves the default file unread then
        (1, []),  # nobody was asked for anything
    ]:
        environment = os.environ | {"HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment |= {} if before else {"ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, *before, str(tmp_path / "count.py"), "--num_processes", "4"]  # the script's own
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        runs[process] = expected
    for process, expected in runs.items():
        output, errors = process.communicate(timeout=300)
        assert output.split() == ["process"] * expected, errors


@pytest.mark.usefixtures("saved_teacher")
def test_a_mistake_is_one_line_and_loses_nothing(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").touch()
    status, output = finish(launch(tmp_path, "run"))
    assert status != 0
    assert output.count("error: the output folder") == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious"]
