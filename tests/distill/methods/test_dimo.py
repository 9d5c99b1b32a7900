import copy
from functools import partial

import pytest
import torch

from distill.methods.dimo import DiMO, DiMOConfig, sample_weights
from distill.methods.divergence import divergence_gradient
from students.adapters import make_learner
from students.initialisation import TokenInitialiser
from teachers.randomness import sample_generators, sample_tokens

BATCH = 6


class Setting:
    """A Di[M]O on the tiny teacher, whose evaluations (rows through each network) are counted."""

    def __init__(self, teacher, **settings):
        self.teacher = teacher
        frozen = copy.deepcopy(teacher.denoiser).requires_grad_(False)
        initialiser = TokenInitialiser.for_teacher(teacher, embedding_noise=0.1)
        learner = partial(make_learner, teacher.denoiser, True)
        self.method = DiMO(DiMOConfig(**settings), frozen, initialiser, learner)
        self.networks = self.method.networks
        with torch.no_grad():  # start apart, so that there is something to learn
            for number, network in enumerate(self.networks.values()):
                torch.manual_seed(number)
                for block in network.blocks.parameters():
                    block.add_(0.1 * torch.randn_like(block))
        self.rows = dict.fromkeys(["student", "auxiliary", "teacher"], 0)
        self.outputs = {}
        for name, network in [*self.networks.items(), ("teacher", frozen)]:
            network.register_forward_hook(lambda module, inputs, logits, name=name: self._record(name, inputs, logits))

    def _record(self, name, inputs, logits):
        self.rows[name] += len(inputs[0])
        if logits.requires_grad:
            logits.retain_grad()
        self.outputs[name] = (inputs[0], logits)

    def losses(self, update, measured=False):
        condition = self.teacher.encode_condition(list(range(BATCH)))
        return self.method.losses(self.networks, update, condition, sample_generators(0, places=range(BATCH)), measured)

    def gradients(self, name):
        return [parameter.grad for parameter in self.networks[name].parameters() if parameter.grad is not None]


def test_the_student_gets_the_divergence_gradient_and_nothing_else(teacher):
    setting = Setting(teacher, beta=-0.2, guidance_scale=1.5)
    losses, _ = setting.losses(("student", "auxiliary"))
    losses["student"].backward()

    corrupted, auxiliary_logits = setting.outputs["auxiliary"]
    _, logits = setting.outputs["student"]
    guided = teacher.denoise(corrupted, teacher.encode_condition(list(range(BATCH))), guidance_scale=1.5)
    mask = corrupted == teacher.mask_token_id
    expected = divergence_gradient(guided[mask], auxiliary_logits, beta=-0.2) / BATCH
    torch.testing.assert_close(logits.grad[mask], expected)
    assert (logits.grad[~mask] == 0).all()
    assert expected.abs().max() > 1e-3
    assert setting.gradients("student")
    assert not setting.gradients("auxiliary")


def test_the_auxiliary_learns_from_the_student_s_tokens_and_does_not_touch_it(teacher):
    setting = Setting(teacher)
    losses, _ = setting.losses(("student", "auxiliary"))
    losses["auxiliary"].backward()
    assert setting.gradients("auxiliary")
    assert not setting.gradients("student")
    assert not list(filter(None, (parameter.grad for parameter in setting.method.teacher.parameters())))


@pytest.mark.parametrize(
    ("settings", "updates", "rows"),
    [
        # student, auxiliary and teacher evaluations per sample and step
        ({}, [("student", "auxiliary")], (1, 1, 1)),
        ({"guidance_scale": 2.0}, [("student", "auxiliary")], (1, 1, 2)),
        ({"auxiliary_updates": 3}, [("student", "auxiliary"), ("auxiliary",), ("auxiliary",)], (3, 3, 1)),
        ({"auxiliary_samples": "fresh"}, [("student",), ("auxiliary",)], (2, 2, 1)),
    ],
)
def test_evaluations_of_a_step(teacher, settings, updates, rows):
    setting = Setting(teacher, **settings)
    assert list(setting.method.updates) == updates
    for update in setting.method.updates:
        losses, _ = setting.losses(update)
        assert set(losses) == set(update)
    assert tuple(count // BATCH for count in setting.rows.values()) == rows


@pytest.mark.parametrize("shape", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}], ids=str)
def test_soft_targets_are_the_distribution_that_the_tokens_are_drawn_from(teacher, shape, monkeypatch):
    """With the probabilities that tokens had as targets, the loss is the mean of what it is with tokens as targets."""
    seen = {}

    def record(logits, tokens, num_tokens, *, soft_targets, **settings):
        seen["soft"] = soft_targets
        return logits.sum() * 0

    monkeypatch.setattr("distill.methods.dimo.masked_cross_entropy", record)
    setting = Setting(teacher, auxiliary_soft_weight=0.5, mask_ratio_range=(1.0, 1.0), **shape)
    setting.losses(("student", "auxiliary"))
    _, logits = setting.outputs["student"]
    generators = sample_generators("many", places=range(BATCH))
    drawn = torch.stack([sample_tokens(logits.detach(), generators, **shape) for _ in range(4000)])
    frequency = torch.nn.functional.one_hot(drawn, 16).float().mean(0).flatten(0, 1)
    assert (frequency - seen["soft"]).abs().max() < 0.05
    assert (seen["soft"][frequency == 0] < 5e-3).all()


def test_a_student_equal_to_its_teacher_s_conditionals_is_at_rest(teacher):
    """Where the auxiliary equals the teacher the gradient vanishes, whatever the student."""
    setting = Setting(teacher)
    setting.networks["auxiliary"].load_state_dict(teacher.denoiser.state_dict())
    losses, metrics = setting.losses(("student", "auxiliary"), measured=True)
    losses["student"].backward()
    assert max(gradient.abs().max() for gradient in setting.gradients("student")) < 1e-5
    total, masked = metrics["divergence"]
    assert (total / masked).abs() < 1e-5


def test_weightings():
    student, teacher = torch.randn(2, 3, 8, 5)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, :2] = mask[1, :4] = mask[2, :] = True
    positions = mask.flatten().nonzero()[:, 0]
    torch.testing.assert_close(sample_weights("sum", student, teacher[mask], positions), torch.full((14,), 1 / 3))
    paper = sample_weights("paper", student, teacher[mask], positions).split([2, 4, 8])
    for row, weights in enumerate(paper):
        count = len(weights)
        difference = (student[row, :count].softmax(-1) - teacher[row, :count].softmax(-1)).abs().mean()
        torch.testing.assert_close(weights, (1 / (3 * count * difference)).expand(count))


def test_learners_have_no_dropout_and_keep_the_embeddings(teacher):
    learner = make_learner(teacher.denoiser.train(), freeze_embeddings=True)
    assert not any(module.training for module in learner.modules())
    assert not any(parameter.requires_grad for parameter in learner.embedding_parameters())
    assert any(parameter.requires_grad for parameter in learner.parameters())
    assert all(parameter.requires_grad for parameter in make_learner(teacher.denoiser, False).parameters())


def test_tokens_of_another_kind_are_refused(teacher):
    DiMO.check(DiMOConfig(), teacher.denoiser)
    teacher.denoiser.token_kind = "continuous"
    with pytest.raises(ValueError, match="this teacher's are continuous"):
        DiMO.check(DiMOConfig(), teacher.denoiser)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("weighting", "dmd"),
        ("mask_schedule", "log"),
        ("auxiliary_samples", "old"),
        ("temperature", 0),
        ("top_p", 0.0),
        ("auxiliary_label_smoothing", 2.0),
        ("auxiliary_updates", 0),
        ("auxiliary_learning_rate", 0),
    ],
)
def test_settings_out_of_range_are_named(setting, value):
    with pytest.raises(ValueError, match=setting):
        DiMOConfig(**{setting: value})
