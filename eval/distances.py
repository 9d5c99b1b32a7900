"""Measures of sets of features: Fréchet and kernel distance, precision, recall, density, coverage, inception score.

Shapes: N samples, D feature dimensions. All sums are float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PART, MAX_PAIRS = 2048, 2**24  # samples, and pairs of them, worked on at a time: 128 MiB of pairs
COLUMNS = 64  # dimensions summed at a time
NUM_NEIGHBOURS = 3  # of precision and recall
NUM_SPLITS = 10  # of the inception score
MIN_SAMPLES = NUM_NEIGHBOURS + 1  # what all measures of two sets together need of each


def check_num_samples(least: int, **counts: int) -> None:
    """A ValueError where there are fewer samples than that, of whatever the counts are called."""
    for name, count in counts.items():
        if count < least:
            raise ValueError(f"there are {count} {name.replace('_', ' ')}; what is measured needs at least {least}")


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) of features, float64."""

    mean: torch.Tensor
    covariance: torch.Tensor

    @classmethod
    def fit(cls, features: torch.Tensor) -> Gaussian:
        """The moments of features (N, D); N must be at least 2."""
        check_num_samples(2, samples=len(features))
        # A mean in float64 first makes a copy in float64 of what it is of.
        mean = torch.cat([part.mean(0, dtype=torch.float64) for part in features.split(COLUMNS, dim=1)])
        num_dimensions = len(mean)
        products = torch.zeros(num_dimensions, num_dimensions, dtype=torch.float64)
        for part in features.split(PART):
            centred = part.double() - mean
            products += centred.T @ centred
        return cls(mean, products / (len(features) - 1))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the distance that FID is on Inception features (arXiv 1706.08500).

    The trace of the root is the sum of the roots of the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2).
    """
    values, vectors = torch.linalg.eigh(first.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    trace_of_root = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (first.mean - second.mean).square().sum()
    distance += first.covariance.trace() + second.covariance.trace() - 2 * trace_of_root
    return distance.clamp(min=0).item()


def kernel_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """The unbiased squared maximum mean discrepancy with kernel (x y / D + 1)^3, which is KID (arXiv 1801.01401).

    Features (N, D) and (M, D), at least two of each; taken over all pairs, so it needs no random subsets.
    """
    check_num_samples(2, first_samples=len(first), second_samples=len(second))

    def kernel_sums(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = sum(((part @ y.T / y.shape[1] + 1) ** 3).sum() for part in x.split(_num_rows(y)))
        diagonal = ((x.square().sum(-1) / x.shape[1] + 1) ** 3).sum()
        return torch.as_tensor(total), diagonal

    x, y = first.double(), second.double()
    n, m = len(x), len(y)
    (xx, xx_diagonal), (yy, yy_diagonal), (xy, _) = kernel_sums(x, x), kernel_sums(y, y), kernel_sums(x, y)
    return ((xx - xx_diagonal) / (n * (n - 1)) + (yy - yy_diagonal) / (m * (m - 1)) - 2 * xy / (n * m)).item()


def precision_recall(real: torch.Tensor, generated: torch.Tensor, k: int = NUM_NEIGHBOURS) -> dict[str, float]:
    """Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797) of features (N, D), (M, D).

    A sample's ball reaches to its k-th nearest neighbour in its own set, which must have more than k samples.
    """
    check_num_samples(k + 1, real_samples=len(real), generated_samples=len(generated))
    real, generated = real.double(), generated.double()
    real_radius, generated_radius = _kth_distance(real, k), _kth_distance(generated, k)
    in_real_ball = torch.zeros(len(generated), dtype=torch.long)  # how many real balls hold a generated sample
    recalled = covered = 0
    num_rows = _num_rows(generated)
    for part, radius in zip(real.split(num_rows), real_radius.split(num_rows), strict=True):
        distance = torch.cdist(part, generated)
        inside = distance <= radius[:, None]
        in_real_ball += inside.sum(0)
        covered += int(inside.any(1).sum())
        recalled += int((distance <= generated_radius[None]).any(1).sum())
    return {
        "precision": (in_real_ball > 0).double().mean().item(),
        "recall": recalled / len(real),
        "density": in_real_ball.double().mean().item() / k,
        "coverage": covered / len(real),
    }


def inception_score(probabilities: torch.Tensor, num_splits: int = NUM_SPLITS) -> float:
    """exp E KL(p(y|x) || p(y)) of class probabilities (N, K), the mean over splits of N (arXiv 1606.03498)."""
    check_num_samples(num_splits, samples=len(probabilities))
    scores = []
    for part in probabilities.double().tensor_split(num_splits):
        conditional_entropy = torch.special.entr(part).sum(-1).mean()
        marginal_entropy = torch.special.entr(part.mean(0)).sum()
        scores.append((marginal_entropy - conditional_entropy).exp())
    return torch.stack(scores).mean().item()


def _kth_distance(features: torch.Tensor, k: int) -> torch.Tensor:
    """The distance from each sample to its k-th nearest other, (N,)."""
    parts = features.split(_num_rows(features))
    return torch.cat([torch.cdist(part, features).topk(k + 1, largest=False).values[:, k] for part in parts])


def _num_rows(others: torch.Tensor) -> int:
    """How many samples to pair with all others (N, D) at a time."""
    return max(1, MAX_PAIRS // len(others))
