import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teachers.corruption import MASK_SCHEDULES, corrupt, random_mask, random_region, scheduled_mask_ratio
from teachers.randomness import sample_generators


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(1, 40), st.integers(0, 2**32))
def test_masks_hold_the_exact_count(ratios, length, seed):
    ratio = torch.tensor(ratios)
    mask = random_mask(ratio, length, torch.Generator().manual_seed(seed))
    assert mask.sum(-1).tolist() == [max(1, round(float(r * length))) for r in ratio]


def test_every_position_is_equally_likely_to_be_masked():
    mask = random_mask(torch.full((20000,), 0.25), 8, torch.Generator().manual_seed(0))
    assert mask.float().mean(0).sub(0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / 20000)


def test_corruption_changes_masked_tokens_only():
    tokens = torch.randint(0, 9, (6, 12))
    corrupted, positions = corrupt(tokens, torch.linspace(0.1, 1, 6), 9, torch.Generator().manual_seed(0))
    mask = corrupted == 9
    assert torch.equal(positions, mask.flatten().nonzero()[:, 0])
    assert mask.sum(-1).tolist() == [1, 3, 6, 8, 10, 12]
    assert torch.equal(corrupted[~mask], tokens[~mask])


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
def test_schedules_fall_from_all_to_none(schedule):
    ratio = scheduled_mask_ratio(schedule, torch.linspace(0, 1, 101))
    assert ratio[0] == pytest.approx(1)
    assert ratio[-1] == pytest.approx(0, abs=1e-6)
    assert (ratio.diff() <= 0).all()


@pytest.mark.parametrize(
    ("schedule", "mean"), [("linear", 1 / 2), ("square", 1 / 3), ("cosine", 2 / math.pi), ("arccos", 2 / math.pi)]
)
def test_mean_mask_ratio_in_training(schedule, mean):
    """The integrals over progress ~ U(0, 1) in closed form."""
    progress = (torch.arange(100000) + 0.5) / 100000
    assert scheduled_mask_ratio(schedule, progress).mean() == pytest.approx(mean, abs=1e-4)


def test_each_position_is_masked_by_itself_with_its_own_probability():
    probability = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    tokens = torch.randint(0, 9, (20000, 5))
    corrupted, positions = corrupt(tokens, probability.expand(20000, 5), 9, torch.Generator().manual_seed(0))
    mask = corrupted == 9
    assert torch.equal(positions, mask.flatten().nonzero()[:, 0])
    assert torch.equal(corrupted[~mask], tokens[~mask])
    assert (mask.float().mean(0) - probability).abs().max() < 4 * math.sqrt(0.25 / 20000)
    correlation = mask[:, 1:4].float().T.corrcoef()
    assert (correlation - torch.eye(3)).abs().max() < 0.03


def test_with_probabilities_nothing_may_be_masked():
    corrupted, positions = corrupt(torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, 4), 9)
    assert len(positions) == 0
    assert (corrupted == 0).all()


def test_what_stays_is_not_masked():
    tokens, stays = torch.randint(0, 9, (6, 12)), torch.rand(6, 12) < 0.5
    corrupted, positions = corrupt(tokens, torch.ones(6), 9, None, stays)
    assert torch.equal(corrupted == 9, ~stays)
    assert torch.equal(positions, (~stays).flatten().nonzero()[:, 0])


def test_regions_are_scattered_or_rectangles_or_all_around_one():
    height, width = 5, 7
    regions = random_region((height, width), sample_generators(0, places=range(4000)))
    assert (regions.sum(-1) > 0).float().mean() > 0.97  # but around a rectangle that is the whole grid
    grid = regions.unflatten(1, (height, width))

    def is_rectangle(cells):
        rows, columns = cells.any(2), cells.any(1)
        return (rows[:, :, None] & columns[:, None, :] == cells).all((1, 2)) & _is_run(rows) & _is_run(columns)

    inside, around = is_rectangle(grid), is_rectangle(~grid) & ~is_rectangle(grid)
    assert inside.float().mean().item() == pytest.approx(0.25, abs=0.12)  # and of the scattered ones a few
    assert around.float().mean().item() == pytest.approx(0.25, abs=0.12)
    known = regions.float().mean(0)
    assert known.max() - known.min() < 0.15  # no place is nearly always known, or never
    assert regions.sum(-1).unique().numel() == height * width + 1


def _is_run(line):
    """Whether the True of each row of (B, N) follow each other without a gap."""
    return (line.int().diff(dim=1, prepend=torch.zeros(len(line), 1, dtype=torch.int)) == 1).sum(1) <= 1
