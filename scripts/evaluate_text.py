"""Measure a text-to-image pipeline on captions: FID and CLIP score, as of 30,000 COCO captions.

    accelerate launch scripts/evaluate_text.py runs/amused/one-step --captions name=captions.txt \\
        --statistics coco_statistics.npz --clip openai/clip-vit-large-patch14 --output runs/amused/evaluation

Run it again to go on after an interruption, on any number of processes. The last line of stdout is one JSON object.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from distill.config import load_config
from distill.jobs.command import run
from distill.loop.launch import run_processes
from eval.chunks import claim, from_images, read_chunks, read_real, write_chunks, write_real
from eval.clip_score import ClipFeatures
from eval.distances import Gaussian, check_num_samples, frechet_distance
from eval.evaluate import identify
from eval.imagenet import read_statistics
from eval.inception import InceptionFeatures, add_inception_options, check_num_images
from eval.real import data_like, describe, names_size, settings_like
from eval.sampling import (
    add_sampling_options,
    json_digest,
    open_pipeline,
    processes,
    sampling_protocol,
    sampling_settings,
)
from teachers.conditions.prompts import PromptConfig, Prompts, load_prompts
from teachers.folder import file_digest


def main() -> None:
    parser = argparse.ArgumentParser(description="FID and CLIP score of a text-to-image pipeline on captions.")
    parser.add_argument("pipeline", help="a MaskedDiffusionPipeline or OneStepPipeline: a folder, or a hub id")
    parser.add_argument("--captions", nargs="+", required=True, metavar="key=value", help="name=, split=, column=")
    real = parser.add_mutually_exclusive_group()
    real.add_argument("--statistics", type=Path, help=".npz with mu and sigma of real images (mode clean)")
    real.add_argument("--real-images", nargs="+", metavar="key=value", help="name=, split=, image_column=, ...")
    parser.add_argument(
        "--clip", default="openai/clip-vit-large-patch14", help="the CLIP that scores: a folder or hub id"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the features of the images")
    parser.add_argument("--num-images", type=int, default=30_000, help="they go round the captions")
    parser.add_argument("--batch-size", type=int, help="images at a time, 100 at most; default: what fits")
    add_sampling_options(parser)
    add_inception_options(parser)
    arguments = parser.parse_args()
    run_processes(lambda: run(lambda: evaluate(arguments)))


def evaluate(arguments: argparse.Namespace) -> None:
    is_main = processes().is_main_process
    captions = load_prompts(load_config(PromptConfig, overrides=arguments.captions))[: arguments.num_images]
    statistics = read_statistics(arguments.statistics) if arguments.statistics else None
    pipeline, data = open_pipeline(arguments.pipeline, arguments), None
    if pipeline.condition_kind != "text":
        raise ValueError(f"{arguments.pipeline} is not conditioned on text; measure it with scripts/evaluate.py")
    settings = sampling_settings(pipeline, arguments)
    protocol = sampling_protocol(pipeline, arguments, settings)
    check_num_samples(2, generated_images=arguments.num_images)
    if arguments.real_images:
        config = settings_like(pipeline, ["label_column=", *arguments.real_images])
        data = data_like(pipeline, config, may_enlarge=names_size(arguments.real_images))
        protocol["data"] = asdict(config) | identify(data)
    if statistics is not None or data is not None:
        check_num_images(arguments, generated_images=arguments.num_images)
    if data is not None:
        check_num_images(arguments, real_images=len(data))
    clip, inception = ClipFeatures.load(arguments.clip, captions, pipeline.device), None
    protocol |= {
        "captions": f"{len(captions)} of {' '.join(arguments.captions)}, {clip.num_cut()} of them cut by the CLIP",
        "captions_sha256": json_digest(captions),
        "clip": clip.name,
    }
    if statistics is not None or data is not None:
        inception = InceptionFeatures(arguments.inception_path, pipeline.device)
        protocol["features"] = inception.name
    if statistics is not None:
        protocol["reference"] = f"{arguments.statistics.name}, sha256 {file_digest(arguments.statistics)}"
    claim(arguments.output, protocol)

    def extract(images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"clip": clip(images)} | ({"inception": inception(images)} if inception else {})

    output = arguments.output
    if data is not None:
        write_real(output, inception, data, is_shown=is_main)
    sampling = {"conditions": Prompts(pipeline, captions), "seed": arguments.seed, "batch_size": arguments.batch_size}
    make = from_images(pipeline, extract, **sampling, **settings)
    write_chunks(output, "images", arguments.num_images, make, is_shown=is_main)
    if not is_main:
        return
    found = read_chunks(output, "images", arguments.num_images)
    measures = clip.judge(found["clip"], found["rows"])
    if data is not None:
        real = read_real(output, data)
        statistics = Gaussian.fit(real["features"])
        protocol["reference"] = describe(" ".join(arguments.real_images), real["digests"])
    if statistics is not None:
        measures["fid"] = frechet_distance(statistics, Gaussian.fit(found["inception"]))
    for name, value in measures.items():
        print(f"{name:20}{value:10.4f}")
    print(f"{'CLIP score x 100':20}{100 * measures['clip_score']:10.2f}")
    print(json.dumps({**measures, "protocol": protocol}))


if __name__ == "__main__":
    main()
