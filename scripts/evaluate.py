"""Measure the images of a teacher or a one-step student against real ones.

    python scripts/evaluate.py runs/digits/one-step --num-images 5000
    python scripts/evaluate.py runs/digits/teacher/pipeline --num-inference-steps 8 --guidance-scale 1.25
    accelerate launch scripts/evaluate.py runs/big/one-step name=FOLDER --features inception --num-images 50000

Run it again to go on after an interruption, on any number of processes. The last line of stdout is one JSON object.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from distill.jobs.command import run
from distill.loop.launch import run_processes
from eval.chunks import claim, from_images, read_chunks, read_real, write_chunks, write_real
from eval.distances import MIN_SAMPLES, check_num_samples
from eval.evaluate import Reference, identify
from eval.inception import add_inception_options, check_num_images
from eval.real import data_like, describe, make_features, names_size, settings_like
from eval.sampling import (
    add_sampling_options,
    json_digest,
    open_pipeline,
    processes,
    sampling_protocol,
    sampling_settings,
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure generated images against real ones.")
    parser.add_argument("pipeline", help="a MaskedDiffusionPipeline or OneStepPipeline: a folder, or a hub id")
    parser.add_argument(
        "data", nargs="*", metavar="key=value", help="the real images, e.g. name=folder; size and colours follow"
    )
    parser.add_argument("--output", type=Path, help="folder for the features; default: runs/evaluation/, by protocol")
    parser.add_argument("--num-images", type=int, default=5000)
    add_sampling_options(parser)
    parser.add_argument("--features", choices=["classifier", "inception"], default="classifier", help="FD, or FID")
    parser.add_argument("--classifier", type=Path, default=Path("runs/classifier"), help="where it is kept")
    add_inception_options(parser)
    arguments = parser.parse_intermixed_args()
    run_processes(lambda: run(lambda: evaluate(arguments)))


def evaluate(arguments: argparse.Namespace) -> None:
    state = processes()
    pipeline = open_pipeline(arguments.pipeline, arguments)
    if pipeline.condition_kind == "text":
        raise ValueError(f"{arguments.pipeline} is conditioned on text: scripts/evaluate_text.py measures it")
    settings = sampling_settings(pipeline, arguments)
    protocol = sampling_protocol(pipeline, arguments, settings)
    config, kind = settings_like(pipeline, arguments.data), arguments.features
    data = data_like(pipeline, config, may_enlarge=names_size(arguments.data))
    check_num_samples(MIN_SAMPLES, generated_images=arguments.num_images, real_images=len(data))
    if kind == "inception":
        check_num_images(arguments, generated_images=arguments.num_images, real_images=len(data))
    about = kind, arguments.inception_path, pipeline.device, pipeline.class_names
    features = make_features(config, arguments.classifier, *about)
    protocol |= {"data": asdict(config) | identify(data), "features": features.name}
    output = arguments.output or Path("runs/evaluation") / json_digest(protocol)[:12]
    claim(output, protocol)
    make = from_images(pipeline, lambda images: {"features": features(images)}, seed=arguments.seed, **settings)
    write_real(output, features, data, is_shown=state.is_main_process)
    write_chunks(output, "images", arguments.num_images, make, is_shown=state.is_main_process)
    if not state.is_main_process:
        return
    real, found = read_real(output, data), read_chunks(output, "images", arguments.num_images)
    reference = Reference(features, real["features"], describe(config.name, real["digests"]))
    measures = reference.measure(found["features"], found["rows"])
    for name, value in measures.items():
        print(f"{name:20} {value:10.4f}")
    nfe = found["nfe"].mean().item()
    protocol["reference"] = reference.source
    print(json.dumps({"pipeline": arguments.pipeline, "nfe": nfe, **measures, "protocol": protocol}))


if __name__ == "__main__":
    main()
