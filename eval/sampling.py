"""How images are sampled, as the options of a command say it: where, how precisely, with which settings."""

from __future__ import annotations

import argparse
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import ConfigMixin
from torch import nn

from distill.loop.launch import asked
from students.loading import load_pipeline
from teachers.component import settings_of, weights_digest
from teachers.pipeline import MaskedDiffusionPipeline, TokenPipeline

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="default: a GPU where there is one; each process its own")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the pipeline's weights")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    add_device_options(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, help="default: the pipeline's")
    parser.add_argument("--num-inference-steps", type=int, help="of a teacher; default: its sampler's")
    parser.add_argument("--guidance-scale", type=float, help="of a teacher; default: its own")


def processes() -> PartialState:
    """The processes of this launch, on CPUs where the launcher was told so; to be asked before anything else asks."""
    return PartialState(cpu=asked("ACCELERATE_USE_CPU"))


def device_of(options: argparse.Namespace) -> torch.device:
    """Where to work, each process on a GPU of its own unless one is named by its number; a device that is not there is
    a ValueError."""
    device = processes().device  # of many processes each has made its own GPU torch's current one, which "cuda" means
    if options.device is None:
        return device if device.type == "cuda" else torch.device("cpu")  # other devices know no float64
    try:
        return torch.empty(0, device=options.device).device
    except (RuntimeError, AssertionError) as error:  # torch's two ways to say so
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device {options.device} cannot be used: {reason}. Without it, each process takes a GPU of its own "
            "if there is one, else the CPU"
        ) from error


def open_pipeline(folder: Path | str, options: argparse.Namespace) -> TokenPipeline:
    """The pipeline of a folder, on the device and in the precision that the options name."""
    return load_pipeline(folder, DTYPES[options.dtype]).to(device_of(options))


def sampling_settings(pipeline: TokenPipeline, options: argparse.Namespace) -> dict[str, Any]:
    """What to call the pipeline with; options of a teacher are a ValueError of a student."""
    settings: dict[str, Any] = {"temperature": options.temperature}
    of_a_teacher = {"num_inference_steps": options.num_inference_steps, "guidance_scale": options.guidance_scale}
    if isinstance(pipeline, MaskedDiffusionPipeline):
        return settings | of_a_teacher
    if given := [name for name, value in of_a_teacher.items() if value is not None]:
        raise ValueError(f"{' and '.join(given)}: for teachers alone, and this is a one-step student")
    return settings


def sampling_protocol(pipeline: TokenPipeline, options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """What figures of its images have to say of how these were made: another protocol, other images.

    ValueError if there are to be none.
    """
    if options.num_images < 1:
        raise ValueError(f"--num-images {options.num_images} must be at least 1")
    return {
        "pipeline": str(Path(options.pipeline)),  # without a slash at the end
        "pipeline_sha256": pipeline_digest(pipeline),
        "dtype": options.dtype,
        "num_images": options.num_images,
        "seed": options.seed,
        "settings": {key: value for key, value in settings.items() if value is not None},
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "clean-fid")},
    }


def pipeline_digest(pipeline: TokenPipeline) -> str:
    """The SHA-256 of weights and settings, its own and its components'."""
    parts = {"": pipeline, **pipeline.components}
    about = {
        "settings": {name: settings_of(part) for name, part in parts.items() if isinstance(part, ConfigMixin)},
        "weights": {name: weights_digest(part) for name, part in parts.items() if isinstance(part, nn.Module)},
    }
    return json_digest(about)


def json_digest(content: Any) -> str:
    """The SHA-256 of what JSON makes of it, whatever the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
