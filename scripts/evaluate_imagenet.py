"""Measure a pipeline on ImageNet by the protocol of published figures: FID, IS, precision, recall of 50,000 images.

    accelerate launch scripts/evaluate_imagenet.py runs/imagenet256/one-step \\
        --statistics fid_stats_imagenet256_guided_diffusion.npz --real-images VIRTUAL_imagenet256_labeled.npz \\
        --output runs/imagenet256/evaluation

Run it again to go on after an interruption, on any number of processes. The last line of stdout is one JSON object.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

from accelerate import PartialState

from distill.jobs.command import run
from distill.loop.launch import run_processes
from eval.chunks import claim, write_chunks
from eval.imagenet import measure, read_images, read_statistics
from eval.inception import InceptionFeatures
from eval.sampling import add_sampling_options, sampling_settings
from students.loading import load_pipeline
from teachers.folder import file_digest
from teachers.pipeline import all_classes

PUBLISHED = {"fid": 6.91, "inception_score": 214.0, "precision": 0.828, "recall": 0.377}
PUBLISHED_PROTOCOL = """
The published figures are of the paper's one-step MaskGIT student (arXiv 2503.15457, table 1). The paper names the
50,000 validation images and Clean-FID; its code compares with ADM's statistics of the training images in mode
legacy_tensorflow, and takes the inception score from torch-fidelity's copy of the network.
Here: the statistics that were given, mode legacy_tensorflow, the inception score from the network of FID (10 splits,
in order), precision and recall with 3 neighbours against the real images that were given."""


def main() -> None:
    parser = argparse.ArgumentParser(description="FID, IS, precision and recall on ImageNet, as published figures.")
    parser.add_argument("pipeline", type=Path, help="folder of a MaskedDiffusionPipeline or OneStepPipeline")
    parser.add_argument("--statistics", type=Path, required=True, help=".npz with mu and sigma of real images (ADM's)")
    parser.add_argument(
        "--real-images", type=Path, help=".npz with arr_0, 10,000 real images, for precision and recall"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder that keeps the features until all are there")
    parser.add_argument("--num-images", type=int, default=50_000)
    parser.add_argument("--batch-size", type=int, default=50)
    add_sampling_options(parser)
    parser.add_argument("--inception-path", type=Path, help="Inception weights; default: downloaded once")
    arguments = parser.parse_args()
    run_processes(lambda: run(lambda: evaluate(arguments)))


def evaluate(arguments: argparse.Namespace) -> None:
    statistics = read_statistics(arguments.statistics)
    real_images = read_images(arguments.real_images) if arguments.real_images else None
    state = PartialState()
    with state.main_process_first():
        features = InceptionFeatures(arguments.inception_path, state.device, mode="legacy_tensorflow")
    pipeline = load_pipeline(arguments.pipeline).to(state.device)
    settings = sampling_settings(pipeline, arguments)
    protocol = {
        "pipeline": str(arguments.pipeline),
        "num_images": arguments.num_images,
        "seed": arguments.seed,
        "settings": settings,
        "features": features.name,
    }
    with state.main_process_first():
        claim(arguments.output, protocol)

    write_chunks(
        pipeline,
        all_classes(pipeline),
        lambda images: {"features": features(images), "probabilities": features.probabilities(images)},
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
    real_features = None if real_images is None else features(real_images / 255)
    measures = measure(arguments.output, arguments.num_images, statistics, real_features)
    print(f"{'':18}{'here':>10}{'published':>12}")
    for name, value in measures.items():
        print(f"{name:18}{value:10.3f}{PUBLISHED.get(name, ''):>12}")
    print(PUBLISHED_PROTOCOL)
    protocol["statistics"] = f"{arguments.statistics.name}, sha256 {file_digest(arguments.statistics)}"
    protocol["versions"] = {name: version(name) for name in ("torch", "diffusers", "clean-fid")}
    print(json.dumps({**measures, "published": PUBLISHED, "protocol": protocol}))


if __name__ == "__main__":
    main()
