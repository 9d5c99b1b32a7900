"""The loop, run in this process by a student job on the tiny teacher."""

import json

import pytest
import torch
from diffusers.training_utils import EMAModel
from student_runs import furthest
from torch._dynamo.testing import CompileCounter

from distill.config import load_config
from distill.jobs.student import load_student
from distill.jobs.teacher import TeacherJob, TokenBatches, train_teacher
from distill.loop.config import TrainingConfig
from distill.loop.throughput import Throughput
from distill.methods.dimo import DiMO
from teachers import MaskedDiffusionPipeline, MaskGITTransformer, PatchTokenizer
from teachers.conditions.condition import ClassLabels
from teachers.cost import forward_flops


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
    monkeypatch.setattr("distill.loop.throughput.matmul_rate", lambda *arguments: 1e9)
    throughput = Throughput(torch.device("cpu"), torch.float32, batch_size=8, sequence_length=16)
    condition, tokens = teacher.encode_condition([3] * 8), torch.zeros(8, 16, dtype=torch.long)
    for _ in range(2):
        with throughput.step(), torch.no_grad():
            teacher.denoiser(tokens, condition)
    assert throughput.flops == 8 * forward_flops(teacher.denoiser)
    rates = throughput.read()
    assert rates["mfu"] * 1e9 / rates["samples_per_second"] == pytest.approx(forward_flops(teacher.denoiser))


def test_the_speed_is_of_the_time_between_lines_without_evaluations(monkeypatch):
    """On a GPU a step returns before it is done; so what counts is the clock, not the time spent in steps."""
    clock = [0.0]
    monkeypatch.setattr("distill.loop.throughput.matmul_rate", lambda *arguments: 1e9)
    monkeypatch.setattr("distill.loop.throughput.time.perf_counter", lambda: clock[0])
    throughput = Throughput(torch.device("cpu"), torch.float32, batch_size=8, sequence_length=16)
    for pause in (0.0, 5.0):
        for _ in range(3):
            with throughput.step():
                pass
        clock[0] += 2.0  # what the device needed after the last step was handed to it
        with throughput.paused():
            clock[0] += pause
        rates = throughput.read()
        assert rates["samples_per_second"] == pytest.approx(3 * 8 / 2.0)
        assert rates["tokens_per_second"] == pytest.approx(16 * 3 * 8 / 2.0)


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
    with pytest.raises(ValueError, match="not the folder of a run"):
        run("run", "training.resume=true")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious"]


def test_to_resume_is_to_go_on_or_to_start(run, monkeypatch, tmp_path):
    whole, lines, _ = run("whole")
    losses, calls = DiMO.losses, []

    def dies(self, *arguments):
        calls.append(None)
        if len(calls) == 3:  # before the first checkpoint
            raise KeyboardInterrupt
        return losses(self, *arguments)

    monkeypatch.setattr(DiMO, "losses", dies)
    with pytest.raises(KeyboardInterrupt):
        run("early", "training.resume=true")  # there is nothing there: it starts
    monkeypatch.undo()
    early, early_lines, step = run("early", "training.resume=true")
    assert (furthest(whole, early), early_lines, step) == (0, lines, 6)

    checkpoint = next((tmp_path / "early" / "checkpoints").glob("step-*"))
    (checkpoint / "trainer.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):  # what was learnt is not to be overwritten
        run("early", "training.resume=true")


def test_a_missing_teacher(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="MaskedDiffusionPipeline"):
        run("run", f"teacher={tmp_path / 'nowhere'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["teacher_dtype=int8"], "choose from float32, bfloat16, float16"),
        (["teacher_dtype=bfloat16"], "needs training.mixed_precision"),
        (["teacher_dtype=bfloat16", "training.mixed_precision=bf16"], "for GPUs"),
    ],
)
def test_precisions_that_a_teacher_cannot_have(run, settings, reason):
    with pytest.raises(ValueError, match=reason):
        run("run", *settings)


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


def test_the_best_checkpoint_is_kept_and_can_be_loaded(run, tmp_path):
    values = {0: 9.0, 1: 5.0, 2: 3.0, 3: 4.0, 4: 6.0, 5: 7.0, 6: 8.0}
    settings = ["training.evaluate_every=1", "training.checkpoint_every=3", "training.keep_checkpoints=1"]
    run("run", *settings, monitor=lambda pipeline, conditions, step, heartbeat: {"fd": values[step]})
    assert {path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")} == {"step-000002", "step-000006"}
    best, _, step = load_student(tmp_path / "run", best=True)
    newest, _, _ = load_student(tmp_path / "run")
    assert step == 2
    assert furthest(best.denoiser.state_dict(), newest.denoiser.state_dict()) > 0


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
