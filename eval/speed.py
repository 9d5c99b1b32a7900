"""How fast a pipeline generates: latency, throughput, peak memory."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from students.pipeline import OneStepPipeline
from teachers.conditions.condition import Conditions
from teachers.cost import decoder_flops, forward_flops, matmul_rate, peak_memory, reset_peak_memory, synchronize
from teachers.pipeline import MaskedDiffusionPipeline, TokenPipeline, all_classes

STEPS = (1, 2, 4, 8, 16, 32)


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
    at the median, the peak memory in MiB (of the GPU, or of the process on CPU), the operations of an image, and the
    share of the rate of a large matrix product at which they were done.
    """
    rows = []
    for pipeline, _ in candidates.values():
        pipeline.set_progress_bar_config(disable=True)  # drawing one takes time
    precisions = {(pipeline.device, pipeline.dtype) for pipeline, _ in candidates.values()}
    rates = {dtype: matmul_rate(device, dtype) for device, dtype in precisions}
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
                reset_peak_memory(device)
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
                memory[name] = max(memory.get(name, 0), peak_memory(device))
        for name in calls:
            pipeline, middle = candidates[name][0], median(seconds[name])
            gflop = evaluations[name] * forward_flops(pipeline.denoiser) / 1e9
            if decode:
                gflop += decoder_flops(pipeline.tokenizer) / 1e9
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
                    "gflop": gflop,
                    "of_bound": 1e9 * gflop * batch_size / rates[pipeline.dtype] / middle,
                }
            )
    return rows


def compare_speed(
    teacher: MaskedDiffusionPipeline,
    student: OneStepPipeline,
    *,
    variants: Sequence[str] = (),
    steps: Sequence[int] | None = None,
    guidance_scale: float = 1.0,
    **settings: Any,
) -> tuple[list[dict[str, Any]], str]:
    """Student, its `variants` and the teacher at these steps (default: 1 to 32, as its tokens allow), without decoding
    and with it: the rows of `measure_speed`, which takes the `settings`, and a summary of them."""
    candidates: dict[str, tuple[TokenPipeline, dict[str, Any]]] = {"student": (student, {})}
    for name in variants:
        candidates[f"student, {name}"] = (VARIANTS[name](copy.deepcopy(student)), {})
    teachers = []
    for count in steps or [count for count in STEPS if count <= teacher.sequence_length]:
        teachers.append(f"teacher, {count} steps")
        candidates[teachers[-1]] = (teacher, {"num_inference_steps": count, "guidance_scale": guidance_scale})
    rows = []
    for decode in (False, True):
        rows += measure_speed(candidates, decode=decode, **settings)
    return rows, speed_summary(rows, "student", teachers)


def _compiled(pipeline: OneStepPipeline) -> OneStepPipeline:
    """On a GPU as CUDA graphs, which matter for small batches."""
    mode = "reduce-overhead" if pipeline.device.type == "cuda" else None
    pipeline.denoiser.compile_repeated_blocks(mode=mode)
    return pipeline


def _channels_last(pipeline: OneStepPipeline) -> OneStepPipeline:
    """The decoder alone: it is what has convolutions."""
    pipeline.tokenizer.to(memory_format=torch.channels_last)
    return pipeline


VARIANTS: dict[str, Callable[[OneStepPipeline], OneStepPipeline]] = {
    "bfloat16": lambda pipeline: pipeline.to(torch.bfloat16),
    "compiled": _compiled,
    "channels last": _channels_last,
}


def sampler_overhead(
    pipeline: TokenPipeline, settings: dict[str, Any], batch_size: int, conditions: Conditions | None = None
) -> float:
    """The share of the time to make tokens that is not spent in the denoiser."""
    seconds, started = 0.0, 0.0

    def now() -> float:
        synchronize(pipeline.device)
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
    lines = [
        f"{'':26} {'batch':>5} {'NFE':>5} {'median ms':>10} {'p95 ms':>9} {'images/s':>9} {'peak MiB':>9} {'GFLOP':>8} "
        f"{'of bound':>8}  what"
    ]
    for row in rows:
        what = "with decoding" if row["decode"] else "generator alone"
        lines.append(
            f"{row['name']:26} {row['batch_size']:5} {row['nfe']:5.1f} {1e3 * row['seconds_median']:10.2f} "
            f"{1e3 * row['seconds_p95']:9.2f} {_short(row['images_per_second']):>9} {row['peak_memory_mib']:9.0f} "
            f"{_short(row['gflop']):>8} {row['of_bound']:8.0%}  {what}"
        )
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def speed_summary(rows: list[dict[str, Any]], student: str, others: list[str]) -> str:
    """For each batch size the decoder's share of the student's time, and the student's speed-ups over others.

    Of rows with and without decoding. The ideal speed-up is the ratio of operations.
    """
    found = {(row["name"], row["batch_size"], row["decode"]): row for row in rows}
    lines = []
    for batch_size in dict.fromkeys(row["batch_size"] for row in rows):
        alone, whole = found[student, batch_size, False], found[student, batch_size, True]
        share = 1 - alone["seconds_median"] / whole["seconds_median"]
        lines.append(f"batch of {batch_size}: decoding is {share:.0%} of the {student}'s time")
        for name in others:
            text = f"  {student} against {name}:"
            for what, decode, mine in [("generator alone", False, alone), ("end to end", True, whole)]:
                other = found[name, batch_size, decode]
                speedup, ideal = other["seconds_median"] / mine["seconds_median"], other["gflop"] / mine["gflop"]
                text += f" {speedup:.3g} x {what} (ideal {ideal:.3g})" + ("," if not decode else "")
            lines.append(text)
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
        synchronize(pipeline.device)
        return output.nfe

    return call
