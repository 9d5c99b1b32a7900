"""That the training step does no more than it has to, and that what measures it measures right."""

import json
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill.benchmark.loss import LossPath
from distill.benchmark.step import PeakMemory, StepBenchmark
from distill.loop.config import TrainingConfig
from teachers.cost import num_parameters

GRID, CODEBOOK_SIZE, BATCH = (4, 4), 16, 2


def benchmark(folder, hidden_size=32, guidance_scale=2.0):
    settings = TrainingConfig(batch_size=BATCH, tracker="none")
    return StepBenchmark(GRID, CODEBOOK_SIZE, hidden_size, 2, guidance_scale, settings, folder)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"auxiliary_samples": "fresh"}, {"adapter_rank": 2}], ids=str)
def test_a_step_that_is_not_measured_reads_nothing_from_the_device(tmp_path, settings):
    """What a host reads it waits for; and positions of unknown number are counted once for an update, on the CPU."""
    step = benchmark(tmp_path).ours(**settings)
    step()
    with Operations() as operations:
        step()
    assert operations.counts["aten._local_scalar_dense.default"] == 0
    assert operations.counts["aten.nonzero.default"] == 1 + ("auxiliary_samples" in settings)
    assert operations.counts["aten._fused_adamw_.default"] == 2

    baseline = benchmark(tmp_path).baseline()
    baseline()
    with Operations() as operations:
        baseline()
    assert operations.counts["aten._local_scalar_dense.default"] > 20  # one for each gradient, and more


def test_peak_memory_is_what_is_held_at_once():
    with PeakMemory() as memory:
        first = torch.zeros(1000)
        second = first + 1
        view = second.view(10, 100)
        del first
        third = view.double()
        del second, view, third
        torch.zeros(500)
    assert memory.peak == 4000 + 8000
    assert memory.held == 0


def test_what_was_there_before_counts_once_and_if_it_is_included():
    before = torch.zeros(1000)
    for included, expected in [(True, 4000 + 2000), (False, 2000)]:
        with PeakMemory() as memory:
            if included:
                memory.include([before])
                before.view(10, 100)
            torch.zeros(500)
        assert memory.peak == expected


def test_adapters_need_a_fraction_of_the_memory_where_weights_dominate(tmp_path):
    setting = benchmark(tmp_path, hidden_size=256)
    weights = 4 * num_parameters(setting.teacher)
    rows = setting.measure({"full": setting.ours, "adapters": lambda: setting.ours(adapter_rank=2)}, num_repeats=1)
    full, adapters = (row["peak_memory_mib"] * 2**20 for row in rows)
    # Teacher, averages and their copy; weights, gradients and two moments of student and auxiliary.
    assert full > 10 * weights
    assert adapters < 0.45 * full
    json.dumps(rows)


def test_losses_of_both_orders_are_of_the_same_size():
    """Equal hidden states give equal gradients: the baseline's of all positions, ours of the masked ones."""
    path = LossPath(BATCH, GRID, CODEBOOK_SIZE, 8, 2.0)
    norms = []
    for call in (path.plain, path.ours):
        total = torch.zeros(2)
        for _ in range(200):
            for network in path.networks.values():
                network.zero_grad()
            call()
            total += torch.stack([network.hidden.grad.norm() for network in path.networks.values()])
        norms.append(total / 200)
    torch.testing.assert_close(*norms, rtol=0.15, atol=0)
