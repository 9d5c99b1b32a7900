"""That a method is a file: one of three networks, defined here and nowhere else, is trained, resumed and exported."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from student_runs import furthest
from torch import nn

from distill.config import load_config, parse_arguments, setting
from distill.jobs.student import StudentJob
from distill.methods import METHODS
from distill.methods.method import Alarm, Method
from students import OneStepPipeline
from teachers.corruption import corrupt
from teachers.objectives.masked import masked_cross_entropy
from teachers.randomness import rand, sample_tokens


@dataclass
class CriticConfig:
    name: str = setting("critic", "which method")
    critic_learning_rate: float = setting(5e-3, "of the critic")
    highest_score: float = setting(1e9, "alarm")


class Critic(nn.Module):
    """Embeddings (B, L, D) -> a score (B,) of how much they look like the teacher's."""

    def __init__(self, hidden_size):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(hidden_size, 16), nn.GELU(), nn.Linear(16, 1))

    def forward(self, embeddings):
        return self.layers(embeddings).mean((1, 2))


class CriticMethod(Method):
    """The student is told by a critic, through soft tokens, how to look like its teacher; an auxiliary looks on."""

    config_class = CriticConfig
    title, reference, url, citation = "Toy", "no paper", "https://example.org", "@misc{toy}"
    updates = (("student",), ("auxiliary", "critic"))
    apart = False  # whether the student's loss flows through a copy of the critic

    def __init__(self, config, teacher, initialiser, learner, compiled=False):
        self.teacher, self.initialiser = teacher, initialiser
        critic = Critic(teacher.config.hidden_size)
        self.networks = {"student": learner(), "auxiliary": learner(), "critic": critic}
        self.optimizers = {"critic": {"lr": config.critic_learning_rate, "betas": (0.5, 0.9)}}
        self.alarms = [Alarm("score", float("-inf"), config.highest_score, "beyond belief")]

    def losses(self, networks, update, condition, generators, measured=False):
        student, auxiliary, critic = (networks[name] for name in ("student", "auxiliary", "critic"))
        initial = self.initialiser(condition, generators)
        if "student" in update:
            probabilities = student(initial, condition).softmax(-1)
            soft = probabilities @ self.teacher.embed(torch.arange(self.initialiser.config.codebook_size))
            score = (copy.deepcopy(critic).requires_grad_(False) if self.apart else critic)(soft)
            return {"student": -score.mean()}, {"score": score.detach().mean()} if measured else {}
        with torch.no_grad():
            made = sample_tokens(student(initial, condition), generators)
            real = sample_tokens(self.teacher(initial, condition), generators)
        progress = rand(len(made), 1, generator=generators).squeeze(1)
        corrupted, positions = corrupt(made, progress, self.teacher.mask_token_id, generators)
        logits = auxiliary(corrupted, condition, positions=positions)
        scores = critic(self.teacher.embed(torch.cat([real, made])))
        targets = torch.cat([torch.ones(len(real)), torch.zeros(len(made))])
        return {
            "auxiliary": masked_cross_entropy(logits, made.flatten()[positions], made.numel()),
            "critic": F.binary_cross_entropy_with_logits(scores, targets),
        }, {}


@pytest.fixture(autouse=True)
def _chosen_by_name(monkeypatch):
    monkeypatch.setitem(METHODS, "critic", CriticMethod)


def networks(output):
    folder = max((output / "checkpoints").glob("step-*"))
    return {name: load_file(folder / f"{name}.safetensors") for name in ("student", "auxiliary", "critic")}


def test_three_networks_learn_resume_and_export(run, tmp_path, command):
    whole, lines, step = run("whole", "method.name=critic")
    assert step == 6
    assert {"score", "student_grad_norm", "auxiliary_grad_norm", "critic_grad_norm"} <= lines[-1].keys()
    assert all(line["critic_grad_norm"] > 0 for line in lines)

    run("parts", "method.name=critic", "training.max_steps=3")
    parts, _, _ = run("parts", "method.name=critic", "training.resume=true")
    assert furthest(whole, parts) == 0
    ends = [networks(tmp_path / name) for name in ("whole", "parts")]
    assert all(furthest(ends[0][name], ends[1][name]) == 0 for name in ends[0])

    status, _, errors = command("export.py", tmp_path / "whole", "--output", "one")
    assert status == 0, errors
    assert furthest(OneStepPipeline.from_pretrained("one").denoiser.state_dict(), whole) == 0
    card = Path("one/README.md").read_text()
    assert "distilled with\nToy ([no paper](https://example.org))" in card
    assert "@misc{toy}" in card
    assert "Di[M]O" not in card


def test_a_loss_leaves_nothing_in_networks_it_flows_through(run, tmp_path, monkeypatch):
    run("through", "method.name=critic")
    monkeypatch.setattr(CriticMethod, "apart", True)
    run("apart", "method.name=critic")
    through, apart = networks(tmp_path / "through"), networks(tmp_path / "apart")
    assert all(furthest(through[name], apart[name]) == 0 for name in through)


def test_its_alarms_are_its_own(run, caplog):
    run("run", "method.name=critic", "method.highest_score=-1000", "alarms.patience=2")
    assert caplog.text.count("score has been beyond belief") == 1


def test_its_settings_are_its_own(tmp_path, capsys):
    job = load_config(StudentJob, overrides=["method.name=critic", "method.critic_learning_rate=0.1"])
    assert job.method == CriticConfig(critic_learning_rate=0.1)
    with pytest.raises(ValueError, match=r"unknown setting method\.beta"):
        load_config(StudentJob, overrides=["method.name=critic", "method.beta=0"])
    with pytest.raises(ValueError, match=r"method\.name='dmd' is not known; choose from dimo, critic"):
        load_config(StudentJob, overrides=["method.name=dmd"])
    (tmp_path / "job.yaml").write_text("method: {name: critic, critic_learning_rate: 0.2}")
    assert load_config(StudentJob, tmp_path / "job.yaml").method.critic_learning_rate == 0.2
    with pytest.raises(SystemExit):
        parse_arguments(StudentJob, "", ["--help"])
    assert "method.critic_learning_rate" in capsys.readouterr().out


def test_the_run_says_which_method_it_was(run, tmp_path):
    run("run", "method.name=critic")
    assert load_config(StudentJob, tmp_path / "run" / "config.yaml").method == CriticConfig()
    assert "guidance_scale" not in (tmp_path / "run" / "config.yaml").read_text()
