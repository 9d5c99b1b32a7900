"""The proof that Di[M]O matches distributions: one step, and the student samples a joint that it knows exactly."""

from functools import partial

import exact
import pytest
import torch
from drawn import redraw

from distill.loop.accelerator import make_accelerator
from distill.loop.trainer import Trainer, TrainingConfig
from distill.methods.dimo import DiMO, DiMOConfig
from students.adapters import make_learner
from students.initialisation import TokenInitialiser
from teachers.conditions.condition import ClassCondition
from teachers.networks.maskgit import MaskGITTransformer
from teachers.objectives.masked import MaskedConfig, MaskedObjective
from teachers.randomness import sample_cumulative, sample_tokens

NUM_SAMPLES = 50000


def no_condition(count):
    return ClassCondition(torch.zeros(count, dtype=torch.long))


def train(output, task, draw_batch, **settings):
    config = TrainingConfig(batch_size=128, tracker="none", warmup_steps=50, ema_decay=0.99, **settings)
    output.mkdir()
    accelerator = make_accelerator(config, output)
    trainer = Trainer(config, accelerator, task, draw_batch, output)
    assert trainer.train()
    return trainer.averaged_network()


def draw_data(step, places, generators):
    cumulative = exact.joint().cumsum(0).expand(len(places), 1, -1).contiguous()
    return exact.states()[sample_cumulative(cumulative, generators).squeeze(1)], no_condition(len(places))


def distil(folder, seed=0, num_steps=1000, auxiliary_learning_rate=3e-3, **settings):
    """Errors (total variation) of one step before and after distillation, from a start of this seed."""
    folder.mkdir()
    untrained = MaskGITTransformer(exact.CODEBOOK_SIZE, 1, (1, exact.LENGTH), 48, 2, 4, 192, dropout=0.0)
    start = train(
        folder / "start",
        MaskedObjective(MaskedConfig(label_dropout=0.0), redraw(untrained, 0.02, seed)),
        draw_batch=draw_data,
        num_steps=300,
        learning_rate=1e-3,
        learning_rate_schedule="cosine",
    )
    teacher = exact.ExactDenoiser()
    initialiser = TokenInitialiser((1, exact.LENGTH), exact.CODEBOOK_SIZE, 1, teacher.mask_token_id)
    config = DiMOConfig(auxiliary_learning_rate=auxiliary_learning_rate, **settings)
    student = train(
        folder / "student",
        DiMO(config, teacher, initialiser, partial(make_learner, start, True)),
        draw_batch=lambda step, places, generators: no_condition(len(places)),
        num_steps=num_steps,
        learning_rate=3e-4,
        learning_rate_schedule="linear",
    )

    def one_step_error(network):
        condition, generator = no_condition(NUM_SAMPLES), torch.Generator().manual_seed(1)
        with torch.no_grad():
            tokens = sample_tokens(network(initialiser(condition, generator), condition), generator)
        return exact.total_variation(exact.histogram(tokens), exact.joint())

    return one_step_error(start), one_step_error(student)


def test_the_one_step_student_samples_the_joint(tmp_path):
    """Total variation below 0.1 after a minute, where the product of the marginals stays above 0.6."""
    before, after = distil(tmp_path / "run")
    errors = {
        "product of the marginals": exact.total_variation(exact.product_of_marginals(), exact.joint()),
        "before distillation": before,
        "one-step student": after,
        "as many samples of the joint": exact.total_variation(exact.histogram(samples_of_the_joint()), exact.joint()),
    }
    print({name: round(error, 3) for name, error in errors.items()})  # for docs/results.md: pytest -s
    assert errors["product of the marginals"] > 0.6
    assert errors["before distillation"] > 0.4
    assert errors["one-step student"] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"auxiliary_learning_rate": 1e-3, "auxiliary_updates": 2, "num_steps": 700}],
    ids=["ten times the rate", "two updates"],
)
def test_the_joint_from_four_starts(tmp_path, settings):
    """An auxiliary that follows, by its rate or by two updates a step, leads the student to the joint from each."""
    errors = [distil(tmp_path / str(seed), seed, **settings)[1] for seed in range(4)]
    print("\n", settings, [round(error, 3) for error in errors])  # for docs/results.md: pytest -m slow -s
    assert max(errors) < 0.1


def samples_of_the_joint():
    return exact.states()[exact.joint().multinomial(NUM_SAMPLES, replacement=True)]
