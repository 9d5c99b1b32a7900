"""Measure a pipeline on ImageNet by the protocol of published figures: FID, IS, precision, recall of 50,000 images.

    accelerate launch scripts/evaluate_imagenet.py runs/imagenet256/one-step \\
        --statistics fid_stats_imagenet256_guided_diffusion.npz --real-images VIRTUAL_imagenet256_labeled.npz \\
        --output runs/imagenet256/evaluation

Run it again to go on after an interruption, on any number of processes. The last line of stdout is one JSON object.
"""

import argparse
import json
from pathlib import Path

import torch

from distill.jobs.command import run
from distill.loop.launch import run_processes
from eval.chunks import claim, from_images, read_chunks, write_chunks
from eval.distances import NUM_SPLITS, check_num_samples
from eval.imagenet import NpzImages, measure, read_statistics
from eval.inception import InceptionFeatures, add_inception_options, check_num_images
from eval.sampling import add_sampling_options, open_pipeline, processes, sampling_protocol, sampling_settings
from teachers.folder import file_digest

PUBLISHED = {"fid": 6.91, "inception_score": 214.0, "precision": 0.828, "recall": 0.377}
PUBLISHED_PROTOCOL = """
The published figures are of the paper's one-step MaskGIT student (arXiv 2503.15457, table 1). The paper names the
50,000 validation images and Clean-FID; its code compares with ADM's statistics of the training images in mode
legacy_tensorflow, and takes the inception score from torch-fidelity's copy of the network.
Here: the statistics that were given, mode legacy_tensorflow, the inception score from the network of FID (10 splits,
in order), precision and recall with 3 neighbours against the real images that were given."""


def main() -> None:
    parser = argparse.ArgumentParser(description="FID, IS, precision and recall on ImageNet, as published figures.")
    parser.add_argument("pipeline", help="a MaskedDiffusionPipeline or OneStepPipeline: a folder, or a hub id")
    parser.add_argument("--statistics", type=Path, required=True, help=".npz with mu and sigma of real images (ADM's)")
    parser.add_argument(
        "--real-images", type=Path, help=".npz with arr_0, 10,000 real images, for precision and recall"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder that keeps the features")
    parser.add_argument("--num-images", type=int, default=50_000)
    parser.add_argument("--batch-size", type=int, help="images at a time, 100 at most; default: what fits")
    add_sampling_options(parser)
    add_inception_options(parser)
    arguments = parser.parse_args()
    run_processes(lambda: run(lambda: evaluate(arguments)))


def evaluate(arguments: argparse.Namespace) -> None:
    state = processes()
    check_num_images(arguments, generated_images=arguments.num_images)
    check_num_samples(NUM_SPLITS, generated_images=arguments.num_images)
    statistics = read_statistics(arguments.statistics)
    real_images = NpzImages(arguments.real_images) if arguments.real_images else None
    pipeline = open_pipeline(arguments.pipeline, arguments)
    if real_images is not None:
        real_images.check(pipeline.tokenizer.config.image_size)
    settings = sampling_settings(pipeline, arguments)
    features = InceptionFeatures(arguments.inception_path, pipeline.device, mode="legacy_tensorflow")
    protocol = sampling_protocol(pipeline, arguments, settings) | {
        "features": features.name,
        "statistics": f"{arguments.statistics.name}, sha256 {file_digest(arguments.statistics)}",
    }
    if real_images is not None:
        digest = file_digest(arguments.real_images)
        protocol["real_images"] = f"{len(real_images)} of {arguments.real_images.name}, sha256 {digest}"
    claim(arguments.output, protocol)

    def extract(images: torch.Tensor) -> dict[str, torch.Tensor]:
        found = features(images)
        return {"features": found, "probabilities": features.probabilities(found)}

    output, num_images, real_features = arguments.output, arguments.num_images, None
    if real_images is not None and state.is_main_process:  # first, as a damaged file shows only now
        real_features = torch.cat([features(images) for images in real_images.batches()])
    make = from_images(pipeline, extract, seed=arguments.seed, batch_size=arguments.batch_size, **settings)
    write_chunks(output, "images", num_images, make, is_shown=state.is_main_process)
    if not state.is_main_process:
        return
    found = read_chunks(output, "images", num_images)
    measures = measure(found["features"], found["probabilities"], statistics, real_features)
    print(f"{'':18}{'here':>10}{'published':>12}")
    for name, value in measures.items():
        print(f"{name:18}{value:10.3f}{PUBLISHED.get(name, ''):>12}")
    print(PUBLISHED_PROTOCOL)
    print(json.dumps({**measures, "published": PUBLISHED, "protocol": protocol}))


if __name__ == "__main__":
    main()
