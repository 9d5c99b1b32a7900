"""How fast a pipeline generates: latency, throughput, peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from teachers.condition import Conditions
from teachers.pipeline import TokenPipeline, all_classes


def measure_speed(
    candidates: dict[str, tuple[TokenPipeline, dict[str, Any]]],
    *,
    batch_sizes: list[int],
    num_repeats: int = 10,
    decode: bool = True,
    conditions: Conditions | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Time pipelines against each other, a round of all of them at a time so that a slow spell hits all alike.

    Args:
        candidates: name -> (pipeline, settings of its call).
        decode: whether tokens are decoded to images; without it the generator alone is timed.
        conditions: what to generate from, by default all classes; prompts are encoded beforehand.

    Returns a row per candidate and batch size: NFE, median and 95th percentile of seconds per batch, images per second
    at the median, and the peak memory in MiB (of the GPU, or of the process on CPU).
    """
    rows = []
    for batch_size in batch_sizes:
        calls = {
            name: _call(pipeline, batch_size, settings, decode, conditions)
            for name, (pipeline, settings) in candidates.items()
        }
        evaluations = {name: call() for name, call in calls.items()}  # the warm-up
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        memory: dict[str, float] = {}
        for repeat in range(num_repeats):
            progress(f"batch of {batch_size}, round {repeat + 1} of {num_repeats}")
            for name, call in calls.items():
                device = candidates[name][0].device
                _reset_peak_memory(device)
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
                memory[name] = max(memory.get(name, 0), _peak_memory(device))
        for name in calls:
            middle = median(seconds[name])
            rows.append(
                {
                    "name": name,
                    "batch_size": batch_size,
                    "nfe": evaluations[name],
                    "decode": decode,
                    "seconds_median": middle,
                    "seconds_p95": torch.tensor(seconds[name]).quantile(0.95).item(),
                    "images_per_second": batch_size / middle,
                    "peak_memory_mib": memory[name],
                }
            )
    return rows


def sampler_overhead(
    pipeline: TokenPipeline, settings: dict[str, Any], batch_size: int, conditions: Conditions | None = None
) -> float:
    """The share of the time to make tokens that is not spent in the denoiser."""
    seconds, started = 0.0, 0.0

    def now() -> float:
        if pipeline.device.type == "cuda":
            torch.cuda.synchronize(pipeline.device)
        return time.perf_counter()

    def start(*_: Any) -> None:
        nonlocal started
        started = now()

    def stop(*_: Any) -> None:
        nonlocal seconds
        seconds += now() - started

    call = _call(pipeline, batch_size, settings, decode=False, conditions=conditions)
    hooks = [pipeline.denoiser.register_forward_pre_hook(start), pipeline.denoiser.register_forward_hook(stop)]
    begin = now()
    call()
    total = now() - begin
    for hook in hooks:
        hook.remove()
    return 1 - seconds / total


def speed_table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'':20} {'batch':>6} {'NFE':>6} {'median ms':>10} {'p95 ms':>8} {'images/s':>9} {'peak MiB':>9}  what"]
    for row in rows:
        lines.append(
            f"{row['name']:20} {row['batch_size']:6} {row['nfe']:6.1f} {1e3 * row['seconds_median']:10.2f} "
            f"{1e3 * row['seconds_p95']:8.2f} {row['images_per_second']:9.0f} {row['peak_memory_mib']:9.0f}  "
            + ("with decoding" if row["decode"] else "generator alone")
        )
    return "\n".join(lines)


def _call(
    pipeline: TokenPipeline, batch_size: int, settings: dict[str, Any], decode: bool, conditions: Conditions | None
) -> Callable[[], float]:
    conditions = all_classes(pipeline) if conditions is None else conditions
    condition = conditions.condition(torch.arange(batch_size) % len(conditions), pipeline.device)
    generator = torch.Generator(pipeline.device).manual_seed(0)
    output_type = "pt" if decode else "tokens"

    def call() -> float:
        output = pipeline(condition=condition, generator=generator, output_type=output_type, **settings)
        if pipeline.device.type == "cuda":
            torch.cuda.synchronize(pipeline.device)
        return output.nfe

    return call


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(device: torch.device) -> float:
    """In MiB; not a number where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")]
    return peaks[0] if peaks else float("nan")
