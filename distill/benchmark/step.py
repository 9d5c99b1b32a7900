"""How fast a training step is, and what memory it takes, against the order of the authors' loop."""

from __future__ import annotations

import tempfile
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill.benchmark.baseline import BaselineStep
from distill.loop.accelerator import make_accelerator
from distill.loop.config import TrainingConfig
from distill.loop.trainer import Trainer
from distill.methods.dimo import DiMO, DiMOConfig
from students.adapters import make_learner
from students.initialisation import TokenInitialiser
from teachers.conditions.condition import ClassCondition
from teachers.cost import count_operations, machine, matmul_rate, num_parameters, synchronize
from teachers.denoiser import Denoiser
from teachers.networks.maskgit import MaskGITTransformer
from teachers.randomness import rand

NUM_CLASSES = 1000


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made within it held at once, beside those that were there before and are included;
    what an operation takes for itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def include(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            self._see(tensor.untyped_storage())

    def _see(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or address in self._known:
            return
        self._known.add(address)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.held -= size


class StepBenchmark:
    """Training steps of Di[M]O on an untrained class-conditional MaskGIT.

    Args:
        settings: of the training loop: mixed precision, compiled layers.
    """

    def __init__(
        self,
        token_grid: tuple[int, int],
        codebook_size: int,
        hidden_size: int,
        num_layers: int,
        guidance_scale: float,
        settings: TrainingConfig,
        folder: Path,
    ):
        self.guidance_scale, self.settings, self.folder = guidance_scale, settings, folder
        self.accelerator = make_accelerator(settings, folder)
        self.device = self.accelerator.device
        self.teacher = make_teacher(token_grid, codebook_size, hidden_size, num_layers).to(self.device)
        self.initialiser = TokenInitialiser(token_grid, codebook_size, NUM_CLASSES, codebook_size).to(self.device)
        if settings.compile:
            self.teacher.compile_repeated_blocks()

    def baseline(self) -> Callable[[], None]:
        """A step in the order of the authors' loop."""
        networks: dict[str, Any] = {name: self._learner() for name in ("student", "auxiliary")}
        labels = torch.randint(NUM_CLASSES, (self.settings.batch_size,), device=self.device)
        step = BaselineStep(self.teacher, self.initialiser, self.guidance_scale, networks)

        def call() -> None:
            with self.accelerator.autocast():
                step(ClassCondition(labels))

        return call

    def ours(self, auxiliary_samples: str = "shared", adapter_rank: int = 0) -> Callable[[], None]:
        """A step of this project's own loop."""
        config = DiMOConfig(guidance_scale=self.guidance_scale, auxiliary_samples=auxiliary_samples)
        learner = partial(self._learner, adapter_rank)
        method = DiMO(config, self.teacher, self.initialiser, learner, compiled=self.settings.compile)
        trainer = Trainer(self.settings, self.accelerator, method, self._draw_condition, self.folder)
        return partial(trainer.train_step, measured=False)  # type: ignore[return-value]

    def _learner(self, adapter_rank: int = 0) -> Denoiser:
        network = make_learner(self.teacher, True, adapter_rank)
        if self.settings.compile:
            network.compile_repeated_blocks()
        return network

    def _draw_condition(self, step: int, places: range, generators: list[torch.Generator]) -> ClassCondition:
        uniform = rand(len(places), 1, generator=generators, device=self.device).squeeze(1)
        return ClassCondition((uniform * NUM_CLASSES).long())

    def measure(self, builders: dict[str, Callable[[], Callable[[], None]]], num_repeats: int) -> list[dict[str, Any]]:
        """A row for each step: median seconds over interleaved rounds, memory, operations, and what bounds them."""
        steps, peaks = {}, {}
        for name, build in builders.items():
            with PeakMemory() as memory:  # of weights, moments and averages too
                memory.include(self.teacher.parameters())
                steps[name] = build()
                steps[name]()
                steps[name]()
            peaks[name] = memory.peak
        flops = {}
        for name, step in steps.items():
            with count_operations() as counter:
                step()
            flops[name] = counter.get_total_flops()
        seconds = interleaved(steps, num_repeats, self.device)
        dtype = torch.bfloat16 if self.settings.mixed_precision == "bf16" else torch.float32
        rate = matmul_rate(self.device, dtype)
        rows = []
        for name in steps:
            bound = flops[name] / rate
            rows.append(
                {
                    "name": name,
                    "seconds_median": seconds[name],
                    "samples_per_second": self.settings.batch_size / seconds[name],
                    "peak_memory_mib": peaks[name] / 2**20,
                    "gflop": flops[name] / 1e9,
                    "seconds_at_matmul_rate": bound,
                    "utilisation": bound / seconds[name],
                }
            )
        return rows


def make_teacher(token_grid: tuple[int, int], codebook_size: int, hidden_size: int, num_layers: int) -> Denoiser:
    """An untrained class-conditional MaskGIT, frozen."""
    network = MaskGITTransformer(
        codebook_size,
        NUM_CLASSES,
        token_grid,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        mlp_size=4 * hidden_size,
    )
    return network.eval().requires_grad_(False)


def interleaved(calls: dict[str, Callable[[], Any]], num_repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each call, one of each in a round, so that a slow spell hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(num_repeats):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def measure_step(
    token_grid: tuple[int, int],
    codebook_size: int,
    hidden_size: int,
    num_layers: int,
    guidance_scale: float,
    settings: TrainingConfig,
    *,
    adapter_rank: int,
    baseline: bool,
    num_repeats: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of the steps with shared samples, fresh ones and adapters, after one in the order of the authors' loop
    if asked for (`baseline`); and what they are of."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = token_grid, codebook_size, hidden_size, num_layers
        benchmark = StepBenchmark(*sizes, guidance_scale, replace(settings, tracker="none"), Path(folder))
        builders: dict[str, Callable[[], Callable[[], None]]] = {
            "shared samples": benchmark.ours,
            "fresh samples": partial(benchmark.ours, auxiliary_samples="fresh"),
            f"adapters of rank {adapter_rank}": partial(benchmark.ours, adapter_rank=adapter_rank),
        }
        if baseline:
            builders = {"the authors' order": benchmark.baseline, **builders}
        rows = benchmark.measure(builders, num_repeats)
    return rows, machine(benchmark.device) | {"parameters": num_parameters(benchmark.teacher)}


def step_table(rows: list[dict[str, Any]]) -> str:
    """The rows as text; ratios are to the first."""
    first = rows[0]
    lines = [
        f"{'step':24} {'median s':>9} {'samples/s':>10} {'ratio':>6} {'peak MiB':>9} {'ratio':>6} {'GFLOP':>8} "
        f"{'bound s':>8} {'of bound':>9}"
    ]
    for row in rows:
        lines.append(
            f"{row['name']:24} {row['seconds_median']:9.3f} {row['samples_per_second']:10.2f} "
            f"{row['samples_per_second'] / first['samples_per_second']:6.2f} {row['peak_memory_mib']:9.0f} "
            f"{row['peak_memory_mib'] / first['peak_memory_mib']:6.2f} {row['gflop']:8.1f} "
            f"{row['seconds_at_matmul_rate']:8.3f} {row['utilisation']:9.0%}"
        )
    return "\n".join(lines)
