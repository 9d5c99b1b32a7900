"""Tables of token probabilities: what is drawn from them, in whatever precision the pipeline is, and what is kept."""

import pytest
import torch

from students import marginals
from students.initialisation import TokenInitialiser
from students.marginals import MarginalTable
from teachers.conditions.condition import ClassCondition

NUM_DRAWS = 20_000


def zipf(num_classes, length, codebook_size):
    """Probabilities (C, L, V) that fall as 1 / rank, in an order of its own for each class and position."""
    probabilities = 1 / torch.arange(1, codebook_size + 1.0)
    generator = torch.Generator().manual_seed(0)
    orders = torch.rand(num_classes, length, codebook_size, generator=generator).argsort(-1)
    return (probabilities / probabilities.sum())[orders]


def total_variation(first, second):
    return 0.5 * (first - second).abs().sum(-1)


def drawn(initialiser, label):
    """How often each token is drawn at the first position."""
    condition, counts = ClassCondition(torch.full((2000,), label)), torch.zeros(initialiser.config.codebook_size)
    generator = torch.Generator().manual_seed(1)
    for _ in range(NUM_DRAWS // 2000):
        tokens = initialiser.random_tokens(condition, generator)
        counts += tokens[:, 0].bincount(minlength=len(counts))
    return counts / NUM_DRAWS


def sampling_noise(probabilities):
    """The expected total variation of as many true draws: half the sum of Poisson's mean deviations."""
    mean = NUM_DRAWS * probabilities.double()
    floor = mean.floor()
    deviation = 2 * ((floor + 1) * mean.log() - mean - torch.lgamma(floor + 1)).exp()
    return (0.5 * deviation.sum() / NUM_DRAWS).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codebook_size", [1024, 8192, 16384])
@pytest.mark.parametrize("way", ["cast", "opened"])
def test_no_precision_of_a_pipeline_changes_what_is_drawn(codebook_size, dtype, way, tmp_path):
    """`pytest -k no_precision -s` prints how far draws are from the truth, and how far true draws would be."""
    probabilities = zipf(2, 1, codebook_size)
    initialiser = TokenInitialiser((1, 1), codebook_size, 2, codebook_size, random_tokens="marginal")
    initialiser.marginals.fill([probabilities])
    if way == "cast":
        initialiser.to(dtype)
    else:
        initialiser.save_pretrained(tmp_path)
        initialiser = TokenInitialiser.from_pretrained(tmp_path, torch_dtype=dtype)
    for label in range(2):
        expected = probabilities[label, 0]
        distance = total_variation(drawn(initialiser, label), expected).item()
        print(f"V = {codebook_size}, {dtype}: {distance:.4f}, sampling noise {sampling_noise(expected):.4f}")
        assert distance < 1.1 * sampling_noise(expected)


def test_uniform_tokens_of_a_half_precision_student_are_uniform_and_in_range():
    initialiser = TokenInitialiser((1, 1), 8192, 2, 8192).to(torch.bfloat16)
    frequency = drawn(initialiser, 0)
    uniform = torch.full((8192,), 1 / 8192)
    assert total_variation(frequency, uniform).item() < 1.1 * sampling_noise(uniform)


def test_a_large_table_keeps_the_most_probable_tokens_and_one_rest(monkeypatch):
    """What is drawn is the true distribution where it is kept, and nowhere further from it than the rest is large."""
    probabilities = zipf(4, 2, 64)
    monkeypatch.setattr(marginals, "MAX_TABLE", 4 * 2 * 16)
    table = MarginalTable(4, 2, 64)
    table.fill(probabilities.split(3))
    assert (table.num_kept, table.is_whole) == (16, False)
    uniform = (torch.arange(NUM_DRAWS) / NUM_DRAWS)[:, None].expand(-1, 2)
    residual = probabilities.masked_fill(probabilities >= probabilities.topk(16).values[..., -1:], 0)
    mean = residual.mean(0)
    for label in range(4):
        tokens = table(torch.full((NUM_DRAWS,), label), uniform)
        frequency = torch.nn.functional.one_hot(tokens, 64).float().mean(0)
        kept = probabilities[label] - residual[label]
        expected = kept + residual[label].sum(-1, keepdim=True) * mean / mean.sum(-1, keepdim=True)
        assert total_variation(frequency, expected).max() < 2e-3
        assert (total_variation(frequency, probabilities[label]) <= residual[label].sum(-1) + 2e-3).all()


@pytest.mark.parametrize("num_classes", [0, 3])
def test_tables_that_were_saved_as_sums_draw_the_same_tokens(num_classes, monkeypatch):
    probabilities = zipf(max(num_classes, 1), 5, 40)
    sums, labels = probabilities.cumsum(-1), torch.arange(1000) % 3
    uniform = torch.rand(1000, 5, generator=torch.Generator().manual_seed(0))
    filled, former = MarginalTable(num_classes, 5, 40), MarginalTable(num_classes, 5, 40)
    filled.fill([probabilities])
    former.fill_from_sums(sums)
    rows = sums[labels] if num_classes else sums.expand(1000, -1, -1)
    expected = torch.searchsorted(rows, (uniform * rows[..., -1])[..., None], right=True).squeeze(-1)
    assert torch.equal(former(labels, uniform), expected)
    assert torch.equal(filled(labels, uniform), expected)


def test_the_largest_released_table_is_small():
    """Halton-384: 1,000 classes, 576 positions, 16,384 tokens; whole it would have 35 GiB."""
    with torch.device("meta"):
        table = MarginalTable(1000, 576, 16384)
    assert table.num_kept == 58
    assert sum(buffer.nbytes for buffer in table.buffers()) < 2**28
