"""Published text-to-image teachers, opened as their authors laid them out: aMUSEd, Meissonic, Monetico."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffusers import UVit2DModel, VQModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from teachers.networks.amused import AmusedDenoiser
from teachers.networks.meissonic import MeissonicTransformer
from teachers.opening import open_part
from teachers.samplers import MaskGITSampler
from teachers.tokenizers.vq import VQTokenizer

# Their authors' steps and guidance; the order is by confidence with noise that fades from 2 to 0.
AMUSED = {"num_inference_steps": 12, "guidance_scale": 10.0}
MEISSONIC = {"num_inference_steps": 64, "guidance_scale": 9.0}
MONETICO = {"num_inference_steps": 48, "guidance_scale": 9.0}

# What their files may name. None of it is imported: Meissonic's authors keep classes of their own in modules of theirs,
# and ours take their place.
CLASSES = {
    "transformer": r"diffusers\.UVit2DModel|.+\.Transformer2DModel",
    "vqvae": r"diffusers\.VQModel",
    "text_encoder": r"transformers\.CLIPTextModelWithProjection",
    "tokenizer": r"transformers\.CLIPTokenizer(Fast)?",
    "scheduler": r"diffusers\.AmusedScheduler|.+\.Scheduler",
}


def is_published(index: dict[str, Any]) -> bool:
    """Whether a `model_index.json` is one of a published teacher: it has a transformer beside a `vqvae`."""
    return {"transformer", "vqvae"} <= set(index)


def published_components(
    folder: Path, network: dict[str, Any], image_size: int | None = None, **given: Any
) -> dict[str, Any]:
    """What `MaskedDiffusionPipeline` is made of, from a published folder whose index was checked.

    Args:
        network: what `open_part` takes for each network.
        image_size: side of the images in pixels; default: what the teacher was trained for.
        given: arguments of the pipeline in place of these, such as `text_encoder` (None: without).

    Raises ValueError where a component's configuration names other classes than `CLASSES`.
    """
    config = _load_config(folder, "transformer")
    _load_config(folder, "vqvae")
    vq = open_part(VQModel, folder / "vqvae", **network)
    factor = 2 ** (len(vq.config.block_out_channels) - 1)

    denoiser: AmusedDenoiser | MeissonicTransformer
    if config["_class_name"] == "UVit2DModel":
        transformer = open_part(UVit2DModel, folder / "transformer", **network)
        side = transformer.config.sample_size if image_size is None else image_size // factor
        denoiser, defaults = AmusedDenoiser.wrap(transformer, (side, side)), AMUSED
    else:
        side = (64 if config["downsample"] else 32) if image_size is None else image_size // factor
        denoiser = open_part(MeissonicTransformer, folder / "transformer", token_grid=(side, side), **network)
        defaults = MEISSONIC if config["downsample"] else MONETICO

    if "text_encoder" not in given:
        given["text_encoder"] = open_part(CLIPTextModelWithProjection, folder / "text_encoder", **network)
    if "text_tokenizer" not in given:
        given["text_tokenizer"] = open_part(CLIPTokenizer, folder / "tokenizer", **network)
    num_steps = min(int(defaults["num_inference_steps"]), side * side)
    return {
        "denoiser": denoiser.eval(),
        "tokenizer": VQTokenizer.wrap(vq, (side, side)).eval(),
        "sampler": MaskGITSampler(num_steps, schedule="cosine", order="confidence", choice_temperature=2.0),
        "guidance_scale": defaults["guidance_scale"],
        **given,
    }


def check_published(index: dict[str, Any]) -> None:
    """Raise ValueError where the index names other classes than `CLASSES`."""
    for component, entry in index.items():
        if not component.startswith("_") and isinstance(entry, list) and any(entry):
            _check_class("model_index.json", component, ".".join(map(str, entry)))


def _load_config(folder: Path, component: str) -> dict[str, Any]:
    config = UVit2DModel.load_config(folder / component)  # as it would read any model's
    _check_class(f"{component}/config.json", component, f"diffusers.{config.get('_class_name')}")
    return config


def _check_class(file: str, component: str, named: str) -> None:
    if not re.fullmatch(CLASSES.get(component, "(?!)"), named):
        raise ValueError(f"{file} is refused: it names {named} as the {component}, and no published teacher's does")
