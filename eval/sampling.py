"""How images are sampled, as the options of a command say it."""

from __future__ import annotations

import argparse
from typing import Any

from teachers.pipeline import MaskedDiffusionPipeline, TokenPipeline


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, help="default: the pipeline's")
    parser.add_argument("--num-inference-steps", type=int, help="of a teacher; default: its sampler's")
    parser.add_argument("--guidance-scale", type=float, help="of a teacher; default: its own")


def sampling_settings(pipeline: TokenPipeline, options: argparse.Namespace) -> dict[str, Any]:
    """What to call the pipeline with; options of a teacher are a ValueError of a student."""
    settings: dict[str, Any] = {"temperature": options.temperature}
    of_a_teacher = {"num_inference_steps": options.num_inference_steps, "guidance_scale": options.guidance_scale}
    if isinstance(pipeline, MaskedDiffusionPipeline):
        return settings | of_a_teacher
    if given := [name for name, value in of_a_teacher.items() if value is not None]:
        raise ValueError(f"{' and '.join(given)}: for teachers alone, and this is a one-step student")
    return settings
