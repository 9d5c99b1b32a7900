"""Measure a text-to-image pipeline on captions: FID and CLIP score, as of 30,000 COCO captions.

    accelerate launch scripts/evaluate_text.py runs/amused/one-step --captions name=captions.txt \\
        --statistics coco_statistics.npz --clip openai/clip-vit-large-patch14 --output runs/amused/evaluation

Run it again to go on after an interruption, on any number of processes. The last line of stdout is one JSON object.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState

from distill.config import load_config
from distill.jobs.command import run
from distill.loop.launch import run_processes
from eval.chunks import claim, read_chunks, write_chunks
from eval.clip_score import ClipFeatures
from eval.distances import Gaussian, frechet_distance
from eval.imagenet import read_statistics
from eval.inception import InceptionFeatures
from eval.sampling import add_sampling_options, sampling_settings
from students.loading import load_pipeline
from teachers.conditions.prompts import PromptConfig, Prompts, load_prompts
from teachers.data import DataConfig, load_data


def main() -> None:
    parser = argparse.ArgumentParser(description="FID and CLIP score of a text-to-image pipeline on captions.")
    parser.add_argument("pipeline", type=str, help="folder of a MaskedDiffusionPipeline or OneStepPipeline")
    parser.add_argument("--captions", nargs="+", required=True, metavar="key=value", help="name=, split=, column=")
    real = parser.add_mutually_exclusive_group()
    real.add_argument("--statistics", type=Path, help=".npz with mu and sigma of real images (mode clean)")
    real.add_argument("--real-images", nargs="+", metavar="key=value", help="name=, split=, image_column=, ...")
    parser.add_argument(
        "--clip", default="openai/clip-vit-large-patch14", help="the CLIP that scores: a folder or hub id"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the features of the images")
    parser.add_argument("--num-images", type=int, default=30_000, help="they go round the captions")
    parser.add_argument("--batch-size", type=int, default=50)
    add_sampling_options(parser)
    parser.add_argument("--inception-path", type=Path, help="Inception weights; default: downloaded once")
    arguments = parser.parse_args()
    run_processes(lambda: run(lambda: evaluate(arguments)))


def evaluate(arguments: argparse.Namespace) -> None:
    captions = load_prompts(load_config(PromptConfig, overrides=arguments.captions))
    statistics = read_statistics(arguments.statistics) if arguments.statistics else None
    state = PartialState()
    with state.main_process_first():
        clip = ClipFeatures.load(arguments.clip, captions, state.device)
        inception = None
        if statistics is not None or arguments.real_images:
            inception = InceptionFeatures(arguments.inception_path, state.device)
    pipeline = load_pipeline(arguments.pipeline).to(state.device)
    if pipeline.condition_kind != "text":
        raise ValueError(f"{arguments.pipeline} is not conditioned on text; measure it with scripts/evaluate.py")
    settings = sampling_settings(pipeline, arguments)
    protocol = {
        "pipeline": arguments.pipeline,
        "captions": f"{len(captions)} of {' '.join(arguments.captions)}, {clip.num_cut} of them cut by the CLIP",
        "num_images": arguments.num_images,
        "seed": arguments.seed,
        "settings": settings,
        "clip": clip.name,
        "features": inception.name if inception else None,
    }
    with state.main_process_first():
        claim(arguments.output, protocol)

    def extract(images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"clip": clip(images)} | ({"inception": inception(images)} if inception else {})

    write_chunks(
        pipeline,
        Prompts(pipeline, captions),
        extract,
        arguments.output,
        arguments.num_images,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        process=state.process_index,
        num_processes=state.num_processes,
        **settings,
    )
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    found = read_chunks(arguments.output, arguments.num_images)
    measures = clip.judge(found["clip"], torch.arange(arguments.num_images) % len(captions))
    if inception is not None:
        if statistics is None:
            statistics = statistics_of(arguments.real_images, inception)
        measures["fid"] = frechet_distance(statistics, Gaussian.fit(found["inception"]))
    for name, value in measures.items():
        print(f"{name:20}{value:10.4f}")
    print(f"{'CLIP score x 100':20}{100 * measures['clip_score']:10.2f}")
    protocol["versions"] = {name: version(name) for name in ("torch", "diffusers", "transformers", "clean-fid")}
    print(json.dumps({**measures, "protocol": protocol}))


def statistics_of(overrides: list[str], features: InceptionFeatures) -> Gaussian:
    data = load_data(load_config(DataConfig, overrides=["label_column=", "num_channels=3", *overrides]))
    return Gaussian.fit(torch.cat([features(images) for images in data.batches(description="real images")]))


if __name__ == "__main__":
    main()
