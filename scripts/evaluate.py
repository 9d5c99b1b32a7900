"""Measure the images of a teacher or a one-step student against real ones.

    python scripts/evaluate.py runs/digits/one-step --num-images 5000
    python scripts/evaluate.py runs/digits/teacher/pipeline --num-inference-steps 8 --guidance-scale 1.25

The last line of stdout is one JSON object.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

from distill.config import load_config
from distill.jobs.command import run
from eval.evaluate import generate
from eval.monitor import reference_for
from eval.sampling import add_sampling_options, sampling_settings
from students.loading import load_pipeline
from teachers.data import DataConfig


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure generated images against real ones.")
    parser.add_argument("pipeline", type=Path, help="folder of a MaskedDiffusionPipeline or OneStepPipeline")
    parser.add_argument("data", nargs="*", metavar="key=value", help="the real images, e.g. name=folder image_size=32")
    parser.add_argument("--num-images", type=int, default=5000)
    add_sampling_options(parser)
    parser.add_argument("--features", choices=["classifier", "inception"], default="classifier", help="FD, or FID")
    parser.add_argument("--classifier", type=Path, default=Path("runs/classifier"), help="where it is kept")
    parser.add_argument("--inception-path", type=Path, help="Inception weights; default: downloaded once")
    run(lambda: evaluate(parser.parse_intermixed_args()))


def evaluate(arguments: argparse.Namespace) -> None:
    data = load_config(DataConfig, overrides=arguments.data)
    pipeline = load_pipeline(arguments.pipeline)
    if pipeline.condition_kind == "text":
        raise ValueError(f"{arguments.pipeline} is conditioned on text: scripts/evaluate_text.py measures it")
    settings = sampling_settings(pipeline, arguments)

    reference = reference_for(data, arguments.classifier, arguments.features, arguments.inception_path)
    images, labels, nfe = generate(
        pipeline, arguments.num_images, seed=arguments.seed, description="generating", **settings
    )
    measures = reference.measure(images, labels)
    for name, value in measures.items():
        print(f"{name:20} {value:10.4f}")
    protocol = {
        "num_images": arguments.num_images,
        "reference": f"{len(reference.real_features)} images of {data.name}",
        "features": reference.features.name,
        "seed": arguments.seed,
        "settings": {key: value for key, value in settings.items() if value is not None},
        "versions": {name: version(name) for name in ("torch", "diffusers", "clean-fid")},
    }
    print(json.dumps({"pipeline": str(arguments.pipeline), "nfe": nfe, **measures, "protocol": protocol}))


if __name__ == "__main__":
    main()
