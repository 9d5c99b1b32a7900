"""What a run does about signals, numbers that are not finite, collapse; how it goes on."""

import json
import math
import signal

import pytest
import torch
from student_runs import furthest

from distill.loop import trainer as trainer_module
from distill.loop.signals import Hopeless, StopRequest
from distill.methods.dimo import DiMO


def with_infinite_loss_at(monkeypatch, steps):
    losses = DiMO.losses
    calls = []

    def faulty(self, *arguments):
        calls.append(None)
        values, metrics = losses(self, *arguments)
        if len(calls) - 1 in steps:
            values["student"] = values["student"] * float("nan")
        return values, metrics

    monkeypatch.setattr(DiMO, "losses", faulty)


def test_a_step_without_finite_loss_is_skipped(run, monkeypatch, caplog):
    with_infinite_loss_at(monkeypatch, {3})
    weights, _, _ = run("run")
    assert all(value.isfinite().all() for value in weights.values())
    assert "step 3" in caplog.text


def test_too_many_of_them_end_the_run(run, monkeypatch):
    with_infinite_loss_at(monkeypatch, {2, 3, 4, 5})
    with pytest.raises(FloatingPointError, match="3 updates in a row"):
        run("run", "training.max_nonfinite_steps=3")


def test_a_skipped_step_leaves_networks_and_optimizers_as_they_were(run, monkeypatch, teacher):
    """In the first step the auxiliary is the teacher still, so that only the second can move the student."""
    with_infinite_loss_at(monkeypatch, {0, 1})
    skipped, _, _ = run("skipped", "training.num_steps=2", "training.warmup_steps=0")
    monkeypatch.undo()
    stepped, _, _ = run("stepped", "training.num_steps=2", "training.warmup_steps=0")
    assert furthest(skipped, teacher.denoiser.state_dict()) == 0
    assert furthest(stepped, teacher.denoiser.state_dict()) > 1e-4


@pytest.mark.parametrize("rank", [0, 2])
def test_interrupted_and_resumed_is_bitwise_the_same(run, monkeypatch, tmp_path, rank):
    settings = ["training.checkpoint_every=2", "initial.embedding_noise=0.1", "training.learning_rate_schedule=linear"]
    settings += [f"adapter_rank={rank}"]
    whole, whole_lines, _ = run("whole", *settings)

    losses, calls = DiMO.losses, []

    def interrupted(self, *arguments):
        calls.append(None)
        if len(calls) == 6:  # in step 5, after the checkpoint of step 4 and a line of metrics
            raise KeyboardInterrupt
        return losses(self, *arguments)

    monkeypatch.setattr(DiMO, "losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("parts", *settings)
    monkeypatch.undo()
    parts, parts_lines, _ = run("parts", *settings, "training.resume=true")

    assert furthest(whole, parts) == 0
    assert whole_lines == parts_lines
    folders = [tmp_path / name / "checkpoints" / "step-000006" for name in ("whole", "parts")]
    files = [{path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} for folder in folders]
    assert {"student.safetensors", "student.adam.safetensors", "auxiliary.safetensors"} <= files[0].keys()
    assert files[0] == files[1]
    speeds = [json.loads(line) for line in (tmp_path / "parts" / "speed.jsonl").read_text().splitlines()]
    assert [line["step"] for line in speeds] == [1, 2, 3, 4, 5, 6]


def test_a_run_cut_short_goes_on_as_if_it_had_not_been(run):
    """`--max-steps` ends a run early; learning rates stay those of the whole."""
    whole, whole_lines, _ = run("whole", "training.learning_rate_schedule=linear")
    _, _, step = run("parts", "training.learning_rate_schedule=linear", "training.max_steps=4")
    assert step == 4
    parts, parts_lines, step = run("parts", "training.learning_rate_schedule=linear", "training.resume=true")
    assert step == 6
    assert furthest(whole, parts) == 0
    assert whole_lines == parts_lines


def test_a_signal_stops_at_the_end_of_the_step(run, monkeypatch, tmp_path):
    losses, calls = DiMO.losses, []

    def signalled(self, *arguments):
        calls.append(None)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return losses(self, *arguments)

    monkeypatch.setattr(DiMO, "losses", signalled)
    _, _, step = run("run")
    assert step == 3


def test_a_second_interrupt_stops_at_once(run, monkeypatch, tmp_path):
    losses, calls = DiMO.losses, []

    def impatient(self, *arguments):
        calls.append(None)
        if len(calls) == 3:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
        return losses(self, *arguments)

    monkeypatch.setattr(DiMO, "losses", impatient)
    with pytest.raises(KeyboardInterrupt):
        run("run", "training.checkpoint_every=2")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]


def test_a_signal_in_an_evaluation_stops_it_and_loses_nothing(run, tmp_path):
    heartbeats = []

    def monitor(pipeline, conditions, step, heartbeat):
        for _ in range(100):
            heartbeats.append(step)
            if len(heartbeats) == 105:  # of the second evaluation
                signal.raise_signal(signal.SIGUSR1)
            heartbeat()
        return {"fd": 1.0}

    _, lines, step = run("run", "training.evaluate_every=3", monitor=monitor)
    assert step == 3
    assert heartbeats == [0] * 100 + [3] * 5
    assert [line["step"] for line in lines if "fd" in line] == [0]


def test_half_floats_skip_what_overflows_and_stay_near_full_precision(run, tmp_path):
    _, full, _ = run("full")
    _, half, _ = run("half", "training.mixed_precision=fp16", "training.num_steps=20")
    losses = json.loads((tmp_path / "half" / "checkpoints" / "step-000020" / "trainer.json").read_text())
    assert losses["loss_scale"]["value"] > 1
    assert half[0]["token_entropy"] != full[0]["token_entropy"]
    assert half[0]["token_entropy"] == pytest.approx(full[0]["token_entropy"], rel=0.02)
    finite = [line for line in half if math.isfinite(line["student_grad_norm"])]
    assert len(finite) >= 10


def test_the_loss_scale_finds_its_size_without_ending_the_run(run, monkeypatch, caplog, teacher):
    """Gradients are too large for any scale above 2 ** 6."""
    clip = trainer_module.Trainer._clip_gradients

    def overflowing(self, name):
        norm = clip(self, name)
        return norm * float("inf") if self.loss_scale.value > 2**6 else norm

    monkeypatch.setattr(trainer_module.Trainer, "_clip_gradients", overflowing)
    weights, _, _ = run("run", "training.mixed_precision=fp16", "training.num_steps=14", "training.warmup_steps=0")
    assert "not finite" not in caplog.text
    assert furthest(weights, teacher.denoiser.state_dict()) > 1e-4


def collapsed(monkeypatch, metric, value, from_call):
    losses, calls = DiMO.losses, []

    def faulty(self, *arguments):
        calls.append(None)
        values, metrics = losses(self, *arguments)
        if len(calls) >= from_call:
            metrics[metric] = torch.tensor(value)
        return values, metrics

    monkeypatch.setattr(DiMO, "losses", faulty)


@pytest.mark.parametrize(
    ("metric", "value"), [("token_entropy", 1e-4), ("unique_tokens", 1e-3), ("auxiliary_cross_entropy", 5.0)]
)
def test_an_alarm_warns_once_it_lasts_and_stops_when_asked(run, monkeypatch, caplog, metric, value):
    collapsed(monkeypatch, metric, value, from_call=2)
    _, _, step = run("warned")
    assert step == 6
    assert [record.message[:6] for record in caplog.records if metric in record.message] == ["step 4"]
    monkeypatch.undo()
    collapsed(monkeypatch, metric, value, from_call=2)
    _, _, step = run("stopped", "alarms.stop=true", "alarms.patience=2")
    assert step == 3


def test_a_healthy_run_sounds_no_alarm(run, caplog):
    run("run")
    assert not caplog.records


def test_a_request_that_comes_while_processes_agree_is_not_lost(monkeypatch, tmp_path):
    def agree(answer):
        stop.make()  # a signal, in the middle of it
        return answer

    monkeypatch.setattr("distill.loop.signals.on_any_process", agree)
    stop = StopRequest(tmp_path)
    assert not stop.is_made()
    assert stop.is_made()


def failing_from(step):
    def monitor(pipeline, conditions, now, heartbeat):
        if now >= step:
            raise RuntimeError("it cannot be measured")
        return {"fd": 1.0}

    return monitor


def test_an_evaluation_that_fails_costs_no_step(run, caplog):
    whole, _, _ = run("whole")
    weights, lines, step = run("run", "training.evaluate_every=2", monitor=failing_from(4))
    assert (furthest(whole, weights), step) == (0, 6)
    assert [line["step"] for line in lines if "fd" in line] == [0, 2]
    assert [record.message[:24] for record in caplog.records] == [
        f"the evaluation of step {step}" for step in (4, 6)
    ]  # of the last step too, whose checkpoint is there


def test_one_that_fails_at_the_start_ends_the_run_before_its_first_step(run, tmp_path):
    with pytest.raises(RuntimeError, match="cannot be measured"):
        run("run", "training.evaluate_every=2", monitor=failing_from(0))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_evaluation_may_find_that_going_on_is_no_use(run, tmp_path):
    def monitor(pipeline, conditions, step, heartbeat):
        if step == 4:
            raise Hopeless("nothing is left")
        return {}

    with pytest.raises(Hopeless):
        run("run", "training.evaluate_every=2", "training.checkpoint_every=2", monitor=monitor)
    assert (tmp_path / "run" / "checkpoints" / "step-000004").exists()
