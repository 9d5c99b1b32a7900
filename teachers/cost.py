"""What a network costs: parameters, floating-point operations, memory; and what the machine can do."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch.utils.flop_counter import FlopCounterMode

from teachers.component import settings_of
from teachers.conditions.condition import ClassCondition, Condition, TextCondition

NUM_TEXT_TOKENS = 77  # CLIP's


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *rest: Any, **more: Any) -> int:
    """Two matrix products: scores of queries (..., L, E) with keys (..., S, E), and sums of values (..., S, D)."""
    return 2 * query[:-1].numel() * key[-2] * (query[-1] + value[-1])


def _attention_backward(
    gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *rest, **more
) -> int:
    """Two for each of those; that kernels compute the scores again does not count."""
    return 2 * _attention(query, key, value)


# By the formula of attention, whatever kernel does it: torch's counter knows those of GPUs alone, and counts otherwise.
KERNELS = ("efficient_attention", "flash_attention", "cudnn_attention", "flash_attention_for_cpu")
FORMULAS = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{suffix}"): formula
    for kernel in KERNELS
    for suffix, formula in [("", _attention), ("_backward", _attention_backward)]
}


class _Counter(FlopCounterMode):
    """torch's counter, which counts nothing where a formula fails: what is counted has to go on."""

    def _count_flops(self, operator, result, arguments, keywords):  # type: ignore[no-untyped-def]
        with contextlib.suppress(Exception):
            return super()._count_flops(operator, result, arguments, keywords)
        return result


@contextlib.contextmanager
def count_operations() -> Iterator[FlopCounterMode]:
    """Counts operations (2 for a multiplication and addition) of what is run within: `counter.get_total_flops()`.

    Compiled layers run as they are written meanwhile, for nothing looks into compiled ones.
    """
    with torch.compiler.set_stance("force_eager"), _Counter(display=False, custom_mapping=FORMULAS) as counter:
        yield counter


def num_parameters(network: ModelMixin) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def forward_flops(denoiser: ModelMixin) -> int:
    """Operations (2 for a multiplication and addition) of a denoiser's forward on one image, without computing it."""
    height, width = denoiser.config.token_grid
    skeleton = _without_weights(denoiser)
    tokens = torch.zeros(1, height * width, dtype=torch.long, device="meta")
    with count_operations() as counter:
        skeleton(tokens, _some_condition(denoiser))
    return counter.get_total_flops()


def _some_condition(denoiser: ModelMixin) -> Condition:
    if denoiser.condition_kind != "text":
        return ClassCondition.none(1, "meta")
    width, pooled_width = denoiser.text_sizes
    shapes = (1, NUM_TEXT_TOKENS, width), (1, pooled_width), (1, 5)
    return TextCondition(*(torch.zeros(shape, device="meta") for shape in shapes))


def decoder_flops(tokenizer: ModelMixin) -> int:
    """Operations of a tokenizer's decoder on one image, without computing it."""
    height, width = tokenizer.token_grid
    skeleton = _without_weights(tokenizer)
    with count_operations() as counter:
        skeleton.decode(torch.zeros(1, height * width, dtype=torch.long, device="meta"))
    return counter.get_total_flops()


def _without_weights(network: ModelMixin) -> ModelMixin:
    with torch.device("meta"):
        return type(network)(**settings_of(network))


def cost_summary(pipeline: DiffusionPipeline) -> str:
    """One line: parameters, and operations per image, of a pipeline's denoiser and decoder.

    Of a network that cannot be made without its weights, or be run on the device "meta", operations are not known.
    """
    denoiser, tokenizer = pipeline.denoiser, pipeline.tokenizer
    line = f"denoiser: {num_parameters(denoiser) / 1e6:.1f} M parameters"
    try:
        evaluation, decoding = forward_flops(denoiser) / 1e9, decoder_flops(tokenizer) / 1e9
    except Exception as error:  # whatever a network of somebody's own does; the line is for information alone
        return f"{line}; its operations could not be counted ({type(error).__name__}: {error})"
    return f"{line}, {evaluation:.1f} GFLOP per image and evaluation; decoding: {decoding:.1f} GFLOP per image"


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Operations a second in a large matrix product, the best of some."""
    size = 8192 if device.type == "cuda" else 1024
    first, second = torch.randn(2, size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        first @ second
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def machine(device: torch.device | str) -> dict[str, Any]:
    """What figures of speed are of: the device, threads and cores, torch's version."""
    name = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else platform.processor() or "CPU"
    return {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """In MiB, of the GPU or of this process; not a number where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")]
    return peaks[0] if peaks else float("nan")
