"""Make a picture of samples from a teacher or a one-step student.

python scripts/sample.py runs/digits/one-step --output grid.png
"""

import argparse
from pathlib import Path

from distill.command import run
from students.export import image_grid
from students.loading import load_pipeline
from teachers.pipeline import MaskedDiffusionPipeline
from teachers.randomness import sample_generators


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a picture of samples from a teacher or a one-step student.")
    parser.add_argument("pipeline", type=Path, help="folder of a MaskedDiffusionPipeline or OneStepPipeline")
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--class-labels", type=int, nargs="+", help="one column each (default: the first ten classes)")
    parser.add_argument("--num-rows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, help="default: the pipeline's")
    parser.add_argument("--num-inference-steps", type=int, help="of a teacher; default: its sampler's")
    parser.add_argument("--guidance-scale", type=float, help="of a teacher; default: its sampler's")
    run(lambda: sample(parser.parse_args()))


def sample(arguments: argparse.Namespace) -> None:
    pipeline = load_pipeline(arguments.pipeline)
    columns = arguments.class_labels or list(range(min(pipeline.num_classes, 10)))
    labels = columns * arguments.num_rows
    settings = {"temperature": arguments.temperature}
    if isinstance(pipeline, MaskedDiffusionPipeline):
        settings["num_inference_steps"] = arguments.num_inference_steps
        settings["guidance_scale"] = arguments.guidance_scale
    generator = sample_generators("sample", arguments.seed, places=range(len(labels)))
    output = pipeline(class_labels=labels, generator=generator, output_type="pt", **settings)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    image_grid(output.images, len(columns)).save(arguments.output)
    print(f"wrote {arguments.output}: {len(labels)} images, {output.nfe:g} network evaluations each")


if __name__ == "__main__":
    main()
