import math

import pytest
import torch

from eval.distances import Gaussian, frechet_distance, inception_score, kernel_distance, precision_recall


def random_covariance(size, seed, rank=None):
    root = torch.randn(size, rank or size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T


def test_commuting_covariances_have_a_closed_form():
    """Diagonal in one basis: |m1 - m2|^2 + sum (sqrt(a) - sqrt(b))^2."""
    basis, _ = torch.linalg.qr(random_covariance(6, 0))
    first, second = torch.rand(2, 6, dtype=torch.float64) * 10
    means = torch.randn(2, 6, dtype=torch.float64)
    gaussians = [
        Gaussian(mean, basis @ values.diag() @ basis.T) for mean, values in zip(means, (first, second), strict=True)
    ]
    expected = (means[0] - means[1]).square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    assert frechet_distance(*gaussians) == pytest.approx(expected.item(), rel=1e-10)


def test_agrees_with_the_eigenvalues_of_the_product():
    """tr (S1 S2)^(1/2) by the other route: the roots of the eigenvalues of the unsymmetric product."""
    first, second = random_covariance(8, 1), random_covariance(8, 2)
    trace = torch.linalg.eigvals(first @ second).real.sqrt().sum()
    expected = (first.trace() + second.trace() - 2 * trace).item()
    zero = torch.zeros(8, dtype=torch.float64)
    assert frechet_distance(Gaussian(zero, first), Gaussian(zero, second)) == pytest.approx(expected, rel=1e-9)


def test_singular_covariances():
    """Fewer samples than dimensions."""
    covariance = random_covariance(20, 3, rank=4)
    zero = torch.zeros(20, dtype=torch.float64)
    assert frechet_distance(Gaussian(zero, covariance), Gaussian(zero, covariance)) == pytest.approx(0, abs=1e-5)
    expected = covariance.trace().item()
    assert frechet_distance(Gaussian(zero, covariance), Gaussian(zero, 0 * covariance)) == pytest.approx(expected)


def test_one_dimension():
    first, second = torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [16.0]])  # variances 2 and 18
    distance = frechet_distance(Gaussian.fit(first), Gaussian.fit(second))
    assert distance == pytest.approx(12**2 + (math.sqrt(18) - math.sqrt(2)) ** 2)
    with pytest.raises(ValueError, match="at least 2"):
        Gaussian.fit(first[:1])


def test_a_mean_by_columns_is_to_the_last_digit_that_of_all():
    features = torch.randn(5000, 100)
    assert torch.equal(Gaussian.fit(features).mean, features.double().mean(0))


def test_kernel_distance_equals_the_sum_over_pairs():
    x, y = torch.randn(5, 3), torch.randn(4, 3) + 1

    def k(a, b):
        return (torch.dot(a.double(), b.double()) / 3 + 1) ** 3

    within_x = sum(k(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    within_y = sum(k(y[i], y[j]) for i in range(4) for j in range(4) if i != j) / 12
    between = sum(k(a, b) for a in x for b in y) / 20
    assert kernel_distance(x, y) == pytest.approx((within_x + within_y - 2 * between).item())


def test_kernel_distance_has_no_bias():
    draws = [torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(200)]
    values = torch.tensor([kernel_distance(*draw) for draw in draws])
    assert values.mean().abs() < 4 * values.std() / math.sqrt(200)


def test_precision_and_recall_of_known_sets():
    line = torch.arange(20.0)[:, None]
    same = precision_recall(line, line + 0.01)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    far = precision_recall(line, line + 1000)
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    # Samples that sit on one real image are precise, but recall little.
    collapsed = precision_recall(line, 5 + 1e-3 * torch.arange(20.0)[:, None])
    assert collapsed["precision"] == 1
    assert collapsed["recall"] <= 0.05
    assert collapsed["coverage"] <= 0.4


@pytest.mark.parametrize(("least", "measure"), [(2, kernel_distance), (4, precision_recall)])
def test_the_least_number_of_samples_is_said(least, measure):
    enough, few = torch.rand(least, 3), torch.rand(least - 1, 3)
    values = measure(enough, enough)
    assert all(map(math.isfinite, values.values() if isinstance(values, dict) else [values]))
    for first, second in [(few, enough), (enough, few)]:
        with pytest.raises(ValueError, match=f"there are {least - 1} .* at least {least}"):
            measure(first, second)


def test_an_inception_score_has_as_many_splits_as_it_says():
    """Of 11 images ten parts, as of 10; not the six of two that a split into equal parts would make."""
    probabilities = torch.eye(11)
    assert inception_score(probabilities[:10]) == pytest.approx(1)  # one image a part: the part is certain of itself
    assert inception_score(probabilities) == pytest.approx((9 * 1 + 2) / 10)
    with pytest.raises(ValueError, match="at least 10"):
        inception_score(probabilities[:9])


def test_density_counts_the_balls():
    """Ten points one apart, k = 1: each ball reaches to its neighbours, so an inner point lies in three."""
    line = torch.arange(10.0)[:, None]
    measures = precision_recall(line, line, k=1)
    assert measures["density"] == pytest.approx((8 * 3 + 2 * 2) / 10)
