"""Convert a released checkpoint to a pipeline folder.

    python scripts/convert.py maskgit --transformer MaskGIT_ImageNet_256.pth --num-attention-heads 16 \
        --vqvae last.ckpt --vqvae-config model.yaml --output runs/imagenet256/maskgit
    python scripts/convert.py random maskgit-256 --output runs/imagenet256/random     # the sizes alone

Files are local, or OWNER/REPOSITORY:FILE on the hub. Pickles are read without running what is in them.
"""

import argparse
import json
from pathlib import Path

from diffusers import DiffusionPipeline

from distill.jobs.command import run
from students.initialisation import TokenInitialiser
from students.pipeline import OneStepPipeline
from teachers.component import settings_of
from teachers.cost import cost_summary
from teachers.folder import new_folder, stamp
from teachers.pipeline import MaskedDiffusionPipeline
from teachers.released.checkpoint import find_file, read_checkpoint
from teachers.released.convert import convert_halton_maskgit, convert_maskgit
from teachers.released.convert_vq import convert_llamagen_vq, convert_taming_vq
from teachers.released.sizes import RELEASED, random_components
from teachers.samplers import HaltonSampler, MaskGITSampler


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a released checkpoint to a pipeline folder.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, (convert, text) in KINDS.items():
        options = kinds.add_parser(kind, help=text, description=f"Convert {text}.")
        options.set_defaults(convert=convert)
        options.add_argument("--transformer", required=True, help="its weights: a file, or OWNER/REPOSITORY:FILE")
        options.add_argument("--num-attention-heads", type=int, required=True, help="no shape tells it")
        options.add_argument("--vqvae", required=True, help="the tokenizer's weights: a file, or OWNER/REPOSITORY:FILE")
        if kind != "halton-maskgit":
            options.add_argument("--vqvae-config", required=True, help="the tokenizer's YAML file")
        add_output(options)
    options = kinds.add_parser("random", help="random weights of a released teacher's sizes, to try speed and memory")
    options.add_argument("name", choices=RELEASED)
    options.set_defaults(convert=random_weights)
    add_output(options)
    arguments = parser.parse_args()
    run(lambda: convert_and_save(arguments))


def add_output(options: argparse.ArgumentParser) -> None:
    options.add_argument("--output", type=Path, required=True, help="folder to write; must be empty or not exist")
    options.add_argument("--dry-run", action="store_true", help="print what was recognised; write nothing")


def random_weights(arguments: argparse.Namespace) -> tuple[MaskedDiffusionPipeline, dict[str, str]]:
    return MaskedDiffusionPipeline(**random_components(arguments.name)), {}


def maskgit(arguments: argparse.Namespace) -> tuple[MaskedDiffusionPipeline, dict[str, str]]:
    denoiser, tokenizer, sources = maskgit_parts(arguments)
    large = denoiser.config.token_grid[0] > 16  # the authors' settings at 512 and at 256 pixels
    sampler = MaskGITSampler(
        num_inference_steps=15 if large else 8,
        choice_temperature=7.0 if large else 4.5,
    )
    guidance = {"guidance_scale": 3.8 if large else 4.0, "guidance_ramp": "linear"}
    return MaskedDiffusionPipeline(denoiser, tokenizer, sampler, **guidance), sources


def maskgit_student(arguments: argparse.Namespace) -> tuple[OneStepPipeline, dict[str, str]]:
    denoiser, tokenizer, sources = maskgit_parts(arguments)
    initialiser = TokenInitialiser(
        denoiser.config.token_grid,
        tokenizer.codebook_size,
        denoiser.config.num_classes,
        denoiser.mask_token_id,
        mask_ratio=(0.6, 0.6),
        random_tokens="uniform",
        embedding_noise=0.1,
        noise_scale="unit",
    )
    return OneStepPipeline(denoiser, tokenizer, initialiser), sources


def maskgit_parts(arguments: argparse.Namespace):
    transformer, vq = read_checkpoint(arguments.transformer), read_checkpoint(arguments.vqvae)
    codebook_size = vq.shape("quantize.embedding.weight")[0]
    denoiser = convert_maskgit(transformer, arguments.num_attention_heads, codebook_size)
    tokenizer = convert_taming_vq(vq, find_file(arguments.vqvae_config), denoiser.config.token_grid)
    return denoiser, tokenizer, {"denoiser": transformer.sha256, "tokenizer": vq.sha256}


# The authors' guidance of their sizes tiny, small, base and large, by hidden size.
HALTON_GUIDANCE = {384: 2.5, 512: 2.0, 768: 1.7, 1024: 1.5}


def halton_maskgit(arguments: argparse.Namespace) -> tuple[MaskedDiffusionPipeline, dict[str, str]]:
    transformer, vq = read_checkpoint(arguments.transformer), read_checkpoint(arguments.vqvae)
    denoiser = convert_halton_maskgit(transformer, arguments.num_attention_heads)
    tokenizer = convert_llamagen_vq(vq, denoiser.config.token_grid)
    if tokenizer.codebook_size != denoiser.config.codebook_size:
        raise ValueError(
            f"{transformer.path} knows {denoiser.config.codebook_size} tokens and {vq.path} {tokenizer.codebook_size}; "
            "they do not belong together"
        )
    height, width = denoiser.config.token_grid
    sampler = HaltonSampler((height, width), num_inference_steps=min(32, height * width))
    guidance_scale = HALTON_GUIDANCE.get(denoiser.config.hidden_size, 2.0)
    pipeline = MaskedDiffusionPipeline(denoiser, tokenizer, sampler, guidance_scale=guidance_scale)
    return pipeline, {"denoiser": transformer.sha256, "tokenizer": vq.sha256}


KINDS = {
    "maskgit": (maskgit, "a class-conditional teacher of MaskGIT-pytorch v1.0"),
    "maskgit-student": (maskgit_student, "a one-step student of such a teacher, as the authors of Di[M]O released it"),
    "halton-maskgit": (halton_maskgit, "a class-conditional teacher of the current Halton-MaskGIT"),
}


def convert_and_save(arguments: argparse.Namespace) -> None:
    pipeline, sources = arguments.convert(arguments)
    describe(pipeline, sources)
    if arguments.dry_run:
        return
    with new_folder(arguments.output) as folder:
        pipeline.save_pretrained(folder)
        for component, digest in sources.items():
            stamp(folder / component, {"kind": arguments.kind, "source_sha256": digest})
        type(pipeline).from_pretrained(folder)  # what cannot be read back should not be kept
    print(f"wrote {arguments.output}")


def describe(pipeline: DiffusionPipeline, sources: dict[str, str]) -> None:
    for name, component in pipeline.components.items():
        if not hasattr(component, "config"):  # a text tokenizer, or none
            continue
        print(f"{name}: {type(component).__name__} {json.dumps(settings_of(component), default=str)}")
        if name in sources:
            print(f"  from a file with SHA-256 {sources[name]}")
    print(cost_summary(pipeline))


if __name__ == "__main__":
    main()
