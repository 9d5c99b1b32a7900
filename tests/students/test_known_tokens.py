"""Distillation for completing images: some initial tokens are known, and stay."""

from functools import partial

import pytest
import torch

from distill.methods.dimo import DiMO, DiMOConfig
from students.adapters import make_learner
from students.initialisation import MARK, TokenInitialiser
from teachers.randomness import noise, sample_generators

BATCH = 40


def known_tokens(mask_token_id):
    """Tokens of which the first half is known."""
    known = torch.randint(0, 16, (BATCH, 16), generator=torch.Generator().manual_seed(1))
    known[:, 8:] = mask_token_id
    return known


def test_known_tokens_are_where_they_were_and_the_others_as_without_them(teacher):
    initialiser, condition = TokenInitialiser.for_teacher(teacher), teacher.encode_condition([3] * BATCH)
    known = known_tokens(teacher.mask_token_id)
    generators = partial(sample_generators, 0, places=range(BATCH))
    initial = initialiser(condition, generators(), known)
    assert torch.equal(initial[:, :8], known[:, :8])
    assert torch.equal(initial[:, 8:], initialiser(condition, generators())[:, 8:])


def test_random_tokens_are_marked_and_nothing_else(teacher):
    initialiser = TokenInitialiser.for_teacher(teacher, known_tokens=0.5)
    condition, known = teacher.encode_condition([3] * BATCH), known_tokens(teacher.mask_token_id)
    initial = initialiser(condition, torch.Generator().manual_seed(0), known)
    embeddings = teacher.denoiser.embed(initial)
    perturb = initialiser.perturbation(initial, known)
    assert perturb is not None
    moved = (perturb(embeddings) - embeddings).abs().sum(-1) > 0
    assert not moved[:, :8].any()
    assert torch.equal(moved[:, 8:], initial[:, 8:] != teacher.mask_token_id)

    direction = noise(1, 1, embeddings.shape[-1], generator=torch.Generator().manual_seed(0))
    along = (perturb(embeddings) - (1 - MARK**2) ** 0.5 * embeddings)[moved]
    assert torch.nn.functional.cosine_similarity(along, direction[0]).min() > 0.999


def test_a_student_for_whole_images_marks_nothing(teacher):
    initialiser = TokenInitialiser.for_teacher(teacher)
    initial = initialiser(teacher.encode_condition([3] * BATCH))
    assert initialiser.perturbation(initial) is None


class Recorded:
    """A Di[M]O for completions, and what its networks were shown in an update of both."""

    def __init__(self, teacher, probability):
        initialiser = TokenInitialiser.for_teacher(teacher, known_tokens=probability)
        self.method = DiMO(DiMOConfig(), teacher.denoiser, initialiser, partial(make_learner, teacher.denoiser, True))
        self.shown = {"student": [], "auxiliary": []}
        self.logits = {}
        for name, network in self.method.networks.items():
            network.register_forward_hook(partial(self.record, name))
            with torch.no_grad():  # start apart from the teacher, so that there is something to learn
                network.layers[0].ff.net[2].weight.add_(len(name))
        condition = teacher.encode_condition([number % 10 for number in range(BATCH)])
        generators = sample_generators(0, places=range(BATCH))
        self.losses, _ = self.method.losses(self.method.networks, ("student", "auxiliary"), condition, generators)

    def record(self, name, module, given, logits):
        self.shown[name].append(given[0])
        self.told = given[2]  # how embeddings are marked; the auxiliary is the last
        self.logits[name] = logits
        if logits.requires_grad:
            logits.retain_grad()


def test_what_is_known_of_the_student_s_samples_stays_and_has_no_loss(teacher):
    recorded = Recorded(teacher, probability=1.0)
    (first, initial), (corrupted,) = recorded.shown["student"], recorded.shown["auxiliary"]
    told = recorded.told
    mask = corrupted == teacher.mask_token_id
    recorded.losses["student"].backward()
    has_loss = recorded.logits["student"].grad.abs().sum(-1) > 0
    assert torch.equal(has_loss, mask)

    # What was known is not masked in x_t, and stands there as it did in x_init.
    generators = sample_generators(0, places=range(BATCH))
    condition = teacher.encode_condition([number % 10 for number in range(BATCH)])
    known, stays = recorded.method.known_tokens(recorded.method.networks["student"], condition, generators)
    assert 0.2 < stays.float().mean() < 0.8
    assert torch.equal(recorded.shown["student"][2], first)
    assert torch.equal(initial[stays], known[stays])
    assert torch.equal(corrupted[stays], known[stays])

    # The auxiliary is told what was known.
    embeddings = teacher.denoiser.embed(corrupted)
    assert torch.equal((told(embeddings) != embeddings).any(-1), stays)


@pytest.mark.parametrize(("probability", "evaluations"), [(0.0, 1), (0.5, 2)])
def test_a_step_costs_one_more_evaluation_of_the_student(teacher, probability, evaluations):
    assert len(Recorded(teacher, probability).shown["student"]) == evaluations


def test_so_many_samples_have_known_tokens(teacher):
    method = Recorded(teacher, 0.5).method
    condition = teacher.encode_condition([3] * 400)
    _, stays = method.known_tokens(method.networks["student"], condition, sample_generators(0, places=range(400)))
    assert stays.any(-1).float().mean().item() == pytest.approx(0.5, abs=0.08)
