"""Student jobs on the tiny teacher, run in this process."""

import json

import pytest
from accelerate.state import AcceleratorState

from distill.config import load_config
from distill.jobs.student import StudentJob, load_student, train_student
from distill.methods.dimo import DiMO

TINY = ["network={hidden_size: 16, num_layers: 1, num_attention_heads: 2, mlp_size: 32}", "tokenizer.codebook_size=16"]
TINY += ["training={num_steps: 2, batch_size: 8, tracker: none, log_every: 1}"]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fail_at(monkeypatch, call):
    losses, calls = DiMO.losses, []

    def faulty(self, *arguments):
        calls.append(None)
        if len(calls) == call:
            raise FloatingPointError("it was too much")
        return losses(self, *arguments)

    monkeypatch.setattr(DiMO, "losses", faulty)


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
        metrics = tmp_path / name / "metrics.jsonl"  # which a run that ends before its first line has not
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        return pipeline.denoiser.state_dict(), lines, step

    return run


def furthest(first, second):
    return max((first[key] - second[key]).abs().max().item() for key in first)
