"""The loop, run in this process by a student job on the tiny teacher."""

import json
import math

import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from torch._dynamo.testing import CompileCounter

from distill import trainer as trainer_module
from distill.config import load_config
from distill.dimo import DiMO
from distill.student_job import StudentJob, load_student, train_student
from distill.teacher_job import TeacherJob, TokenBatches, train_teacher
from distill.throughput import Throughput
from distill.training_config import TrainingConfig
from teachers import MaskedDiffusionPipeline, MaskGITTransformer, PatchTokenizer
from teachers.condition import ClassLabels
from teachers.cost import forward_flops


@pytest.fixture
def run(teacher, tmp_path):
    """Runs a student job; returns its averaged weights and its metrics."""
    teacher.save_pretrained(tmp_path / "teacher")

    def run(name, *overrides, monitor=None):
        job = load_config(
            StudentJob,
            overrides=[
                f"teacher={tmp_path / 'teacher'}",
                f"output={tmp_path / name}",
                "training.num_steps=6",
                "training.batch_size=8",
                "training.tracker=none",
                "training.log_every=1",
                "training.warmup_steps=2",
                "training.learning_rate=0.01",
                *overrides,
            ],
        )
        AcceleratorState._reset_state(reset_partial_state=True)  # a process of its own would have its own
        train_student(job, monitor)
        pipeline, _, step = load_student(tmp_path / name)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return pipeline.denoiser.state_dict(), lines, step

    return run


def furthest(first, second):
    return max((first[key] - second[key]).abs().max().item() for key in first)


def test_a_run_repeats_itself_and_the_seed_matters(run):
    first, lines, step = run("first", "initial.embedding_noise=0.1")
    second, _, _ = run("second", "initial.embedding_noise=0.1")
    other, _, _ = run("other", "initial.embedding_noise=0.1", "training.seed=1")
    assert furthest(first, second) == 0
    assert furthest(first, other) > 1e-4
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"divergence", "teacher_agreement", "token_entropy", "auxiliary_cross_entropy"} <= lines[0].keys()
    assert step == 6


def test_accumulation_gives_the_same_run(run):
    whole, whole_lines, _ = run("whole")
    parts, parts_lines, _ = run("parts", "training.gradient_accumulation_steps=4")
    assert furthest(whole, parts) < 1e-4
    for one, other in zip(whole_lines, parts_lines, strict=True):
        assert one["student_grad_norm"] == pytest.approx(other["student_grad_norm"], rel=1e-2, abs=1e-5)


def test_half_precision_stays_near_full_precision(run):
    _, full, _ = run("full")
    weights, half, _ = run("half", "training.mixed_precision=bf16")
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())
    assert half[0]["token_entropy"] != full[0]["token_entropy"]
    assert half[0]["token_entropy"] == pytest.approx(full[0]["token_entropy"], rel=0.02)


def test_the_student_learns_and_the_frozen_embeddings_stay(run, teacher):
    weights, _, _ = run("run")
    start = teacher.denoiser.state_dict()
    changed = {key for key in weights if not torch.equal(weights[key], start[key])}
    assert changed
    assert not changed & {"token_embedding.weight", "class_embedding.weight", "position_embedding", "output_bias"}


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


def test_adapters_end_as_a_plain_student(run, teacher, tmp_path):
    weights, lines, _ = run("run", "adapter_rank=2")
    start = teacher.denoiser.state_dict()
    assert weights.keys() == start.keys()
    changed = {key for key in weights if not torch.equal(weights[key], start[key])}
    assert changed
    assert all(key.startswith("blocks.") and key.endswith(".weight") for key in changed)
    assert lines[-1]["divergence"] > 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000006" / "student.safetensors"
    assert checkpoint.stat().st_size < 0.3 * sum(tensor.nbytes for tensor in start.values())


def test_the_log_says_how_fast_and_how_large(run, teacher, tmp_path):
    run("run", "training.log_every=2", "training.num_steps=4", "method.guidance_scale=2")
    lines = [json.loads(line) for line in (tmp_path / "run" / "speed.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert line["tokens_per_second"] == pytest.approx(16 * line["samples_per_second"])
        assert 0 < line["mfu"] < 1
        assert line["peak_memory_mib"] > 100


def test_operations_of_a_step_are_counted(teacher, monkeypatch):
    monkeypatch.setattr("distill.throughput.matmul_rate", lambda *arguments: 1e9)
    throughput = Throughput(torch.device("cpu"), torch.float32, batch_size=8, sequence_length=16)
    condition, tokens = teacher.encode_condition([3] * 8), torch.zeros(8, 16, dtype=torch.long)
    for _ in range(2):
        with throughput.step(), torch.no_grad():
            teacher.denoiser(tokens, condition)
    assert throughput.flops == 8 * forward_flops(teacher.denoiser)
    rates = throughput.read()
    assert rates["mfu"] * 1e9 / rates["samples_per_second"] == pytest.approx(forward_flops(teacher.denoiser))


def test_the_teacher_is_in_no_checkpoint(run, tmp_path):
    run("run")
    names = {path.name for path in (tmp_path / "run" / "checkpoints" / "step-000006").iterdir()}
    networks = {f"{name}{kind}.safetensors" for name in ("student", "auxiliary") for kind in ("", ".adam")}
    assert names == networks | {"averaged.safetensors", "manifest.json", "trainer.json"}


def test_nothing_is_overwritten_and_nothing_is_resumed_from_nowhere(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").touch()
    with pytest.raises(ValueError, match="not empty"):
        run("run")
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        run("run", "training.resume=true")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious"]


def test_a_missing_teacher(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="MaskedDiffusionPipeline"):
        run("run", f"teacher={tmp_path / 'nowhere'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"), ({"ACCELERATE_USE_FSDP": "true"}, "first version")],
)
def test_launches_of_one_model_at_a_time_are_refused(run, monkeypatch, tmp_path, environment, reason):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=reason):
        run("refused")
    assert not (tmp_path / "refused").exists()


def test_a_batch_that_does_not_divide(run):
    with pytest.raises(ValueError, match="does not divide"):
        run("run", "training.gradient_accumulation_steps=3")


def test_the_monitor_sees_the_averaged_student(run):
    seen = {}

    def monitor(pipeline, conditions, step, heartbeat):
        seen[step] = {key: value.clone() for key, value in pipeline.denoiser.state_dict().items()}
        return {"fd": 1.0}

    weights, lines, _ = run("run", "training.evaluate_every=4", monitor=monitor)
    assert list(seen) == [0, 4, 6]
    assert furthest(seen[6], weights) == 0
    assert {"step": 4, "fd": 1.0} in lines


def test_a_signal_stops_at_the_end_of_the_step(run, monkeypatch, tmp_path):
    losses, calls = DiMO.losses, []

    def signalled(self, *arguments):
        calls.append(None)
        if len(calls) == 3:
            trainer_module.signal.raise_signal(trainer_module.signal.SIGTERM)
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
                trainer_module.signal.raise_signal(trainer_module.signal.SIGINT)
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
                trainer_module.signal.raise_signal(trainer_module.signal.SIGUSR1)
            heartbeat()
        return {"fd": 1.0}

    _, lines, step = run("run", "training.evaluate_every=3", monitor=monitor)
    assert step == 3
    assert heartbeats == [0] * 100 + [3] * 5
    assert [line["step"] for line in lines if "fd" in line] == [0]


def test_the_best_checkpoint_is_kept_and_can_be_loaded(run, tmp_path):
    values = {0: 9.0, 1: 5.0, 2: 3.0, 3: 4.0, 4: 6.0, 5: 7.0, 6: 8.0}
    settings = ["training.evaluate_every=1", "training.checkpoint_every=3", "training.keep_checkpoints=1"]
    run("run", *settings, monitor=lambda pipeline, conditions, step, heartbeat: {"fd": values[step]})
    assert {path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")} == {"step-000002", "step-000006"}
    best, _, step = load_student(tmp_path / "run", best=True)
    newest, _, _ = load_student(tmp_path / "run")
    assert step == 2
    assert furthest(best.denoiser.state_dict(), newest.denoiser.state_dict()) > 0


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


def test_averaged_weights_warm_up():
    """min(decay, (1 + n) / (10 + n)), after a first step that takes the weights as they are."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    ema = EMAModel([parameter], decay=0.3, foreach=True)
    ema.step([parameter])
    expected = 0.0
    for n in range(1, 6):
        with torch.no_grad():
            parameter += 1
        ema.step([parameter])
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        assert ema.shadow_params[0].item() == pytest.approx(expected)


def test_every_epoch_shows_each_row_once():
    batches = TokenBatches(
        torch.arange(10)[:, None], ClassLabels(torch.arange(10)), TrainingConfig(batch_size=4), torch.device("cpu")
    )
    rows = torch.cat([batches(step, range(4), [])[0].flatten() for step in range(5)])
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()
    _, condition = batches(2, range(1, 3), [])
    assert condition.class_labels.tolist() == rows[9:11].tolist()


def test_a_teacher_job_ends_with_a_pipeline(tmp_path):
    overrides = [
        f"output={tmp_path / 'run'}",
        "tokenizer.codebook_size=16",
        "network={hidden_size: 16, num_layers: 1, num_attention_heads: 2, mlp_size: 32}",
        "sampler.order=random",
        "training={num_steps: 30, batch_size: 32, learning_rate: 0.003, warmup_steps: 5, log_every: 1, tracker: none}",
    ]
    train_teacher(load_config(TeacherJob, overrides=overrides))
    pipeline = MaskedDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline.sampler.config.order == "random"
    assert len(pipeline([0, 9]).images) == 2
    folders = [tmp_path / "run" / "tokenizer", tmp_path / "run" / "pipeline" / "tokenizer"]
    used, kept = map(PatchTokenizer.from_pretrained, folders)
    assert torch.equal(used.codebook, kept.codebook)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["cross_entropy"] < lines[0]["cross_entropy"] - 0.1


def test_a_teacher_needs_labels(tmp_path):
    (tmp_path / "images").mkdir()
    PIL.Image.new("L", (4, 4)).save(tmp_path / "images" / "0.png")
    overrides = [f"output={tmp_path / 'run'}", f"data.name={tmp_path / 'images'}", "data.label_column=''"]
    with pytest.raises(ValueError, match="label_column"):
        train_teacher(load_config(TeacherJob, overrides=overrides))


@pytest.mark.parametrize("rank", [0, 2])
def test_compiled_layers_give_the_same_run(run, monkeypatch, rank):
    """Layers as far as a graph: what a compiler makes of one is not this project's. The gradient's sums move."""
    plain, lines, _ = run("plain", f"adapter_rank={rank}")
    counter, compile_blocks = CompileCounter(), MaskGITTransformer.compile_repeated_blocks
    monkeypatch.setattr(
        MaskGITTransformer, "compile_repeated_blocks", lambda network: compile_blocks(network, backend=counter)
    )
    torch.compiler.reset()
    compiled, compiled_lines, _ = run("compiled", f"adapter_rank={rank}", "training.compile=true")
    assert counter.frame_count > 0
    assert compiled.keys() == plain.keys()
    assert furthest(plain, compiled) < 1e-4
    assert lines[-1]["divergence"] == pytest.approx(compiled_lines[-1]["divergence"], rel=1e-3)
