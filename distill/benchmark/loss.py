"""What the loss alone takes, of time and memory, against the order of the authors' loop.

Shapes: B batch, L tokens, M masked tokens of the batch, D hidden size, V codebook size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from distill.benchmark.baseline import BaselineStep
from distill.benchmark.step import PeakMemory, interleaved
from distill.methods.dimo import DiMO, DiMOConfig
from students.initialisation import TokenInitialiser
from teachers.conditions.condition import ClassCondition
from teachers.randomness import sample_generators


class _Head(nn.Module):
    """The output layer of a denoiser, on hidden states that do not depend on its input."""

    def __init__(self, shape: tuple[int, int, int], codebook: torch.Tensor, mask_token_id: int):
        super().__init__()
        self.hidden, self.codebook = nn.Parameter(torch.randn(shape)), codebook
        self.mask_token_id = mask_token_id

    def forward(
        self, tokens: torch.Tensor, condition: object, perturb: None = None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        hidden = self.hidden.repeat(len(tokens) // len(self.hidden), 1, 1)
        return (hidden if positions is None else hidden.flatten(0, 1)[positions]) @ self.codebook.T


class LossPath:
    """From the last hidden states of student, teacher, auxiliary to their gradients: in the authors' order, and ours.

    What computes the hidden states is left out, and their gradients go no further.
    """

    def __init__(
        self,
        batch_size: int,
        token_grid: tuple[int, int],
        codebook_size: int,
        hidden_size: int,
        guidance_scale: float,
    ):
        shape = (batch_size, token_grid[0] * token_grid[1], hidden_size)
        codebook = torch.randn(codebook_size, hidden_size) / hidden_size**0.5
        self.networks: dict[str, nn.Module] = {
            name: _Head(shape, codebook, codebook_size) for name in ("student", "auxiliary")
        }
        teacher: Any = _Head(shape, codebook, codebook_size).requires_grad_(False)
        self.condition = ClassCondition(torch.zeros(batch_size, dtype=torch.long))
        self.initialiser = TokenInitialiser(token_grid, codebook_size, 1, codebook_size)
        config = DiMOConfig(guidance_scale=guidance_scale)
        learner: Any = iter([*self.networks.values()] * 2).__next__
        self.method = DiMO(config, teacher, self.initialiser, learner)
        self.compiled = DiMO(config, teacher, self.initialiser, learner, compiled=True)
        self.baseline = BaselineStep(teacher, self.initialiser, guidance_scale, self.networks)

    def plain(self) -> None:
        self.baseline.student_loss(self.condition)[0].backward()
        self.baseline.auxiliary_loss(self.condition).backward()

    def ours(self, compiled: bool = False) -> None:
        method = self.compiled if compiled else self.method
        generators = sample_generators(0, places=range(len(self.condition)))
        losses, _ = method.losses(self.networks, method.updates[0], self.condition, generators)
        torch.stack(list(losses.values())).sum().backward()

    def measure(self, num_repeats: int) -> list[dict[str, Any]]:
        """A row for each: median seconds over interleaved rounds, and the peak of the memory that its tensors held."""
        calls: dict[str, Callable[[], None]] = {
            "plain": self.plain,
            "ours": self.ours,
            "compiled": partial(self.ours, compiled=True),
        }
        peaks = {}
        for name, call in calls.items():
            call()  # for what is compiled
            with PeakMemory() as memory:
                call()
            peaks[name] = memory.peak
        seconds = interleaved(calls, num_repeats, torch.device("cpu"))
        return [
            {"name": name, "seconds_median": seconds[name], "peak_memory_mib": peaks[name] / 2**20} for name in calls
        ]


def measure_loss(codebook_sizes: list[int], num_repeats: int, **sizes: Any) -> list[dict[str, Any]]:
    """The rows of a `LossPath` of these sizes at each codebook size."""
    return [
        {"codebook_size": codebook_size, **row}
        for codebook_size in codebook_sizes
        for row in LossPath(codebook_size=codebook_size, **sizes).measure(num_repeats)
    ]


def loss_table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'codebook':>8} {'path':8} {'median ms':>10} {'peak MiB':>9}"]
    for row in rows:
        milliseconds = 1e3 * row["seconds_median"]
        lines.append(f"{row['codebook_size']:8} {row['name']:8} {milliseconds:10.1f} {row['peak_memory_mib']:9.1f}")
    return "\n".join(lines)
