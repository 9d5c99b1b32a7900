"""Make a picture of samples from a teacher or a one-step student.

python scripts/sample.py runs/digits/one-step --output grid.png
python scripts/sample.py runs/emoji/one-step --prompt "red apple" "waving hand, dark skin tone" --output grid.png
"""

import argparse
from pathlib import Path

import torch

from distill.jobs.command import run
from students.export import image_grid
from students.loading import load_pipeline
from teachers.conditions.condition import Condition
from teachers.pipeline import MaskedDiffusionPipeline, TokenPipeline
from teachers.randomness import sample_generators


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a picture of samples from a teacher or a one-step student.")
    parser.add_argument("pipeline", type=Path, help="folder of a MaskedDiffusionPipeline or OneStepPipeline")
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--class-labels", type=int, nargs="+", help="one column each (default: the first ten classes)")
    parser.add_argument("--prompt", nargs="+", help="one column each, for a model of text")
    parser.add_argument("--negative-prompt", help="of a teacher of text; default: its own")
    parser.add_argument("--num-rows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, help="default: the pipeline's")
    parser.add_argument("--num-inference-steps", type=int, help="of a teacher; default: its sampler's")
    parser.add_argument("--guidance-scale", type=float, help="of a teacher; default: its sampler's")
    run(lambda: sample(parser.parse_args()))


def sample(arguments: argparse.Namespace) -> None:
    pipeline = load_pipeline(arguments.pipeline)
    columns = columns_of(pipeline, arguments)
    settings = {"temperature": arguments.temperature}
    if isinstance(pipeline, MaskedDiffusionPipeline):
        settings["num_inference_steps"] = arguments.num_inference_steps
        settings["guidance_scale"] = arguments.guidance_scale
    condition = columns.select(torch.arange(len(columns)).repeat(arguments.num_rows))
    generator = sample_generators("sample", arguments.seed, places=range(len(condition)))
    output = pipeline(condition=condition, generator=generator, output_type="pt", **settings)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    image_grid(output.images, len(columns)).save(arguments.output)
    print(f"wrote {arguments.output}: {len(condition)} images, {output.nfe:g} network evaluations each")


def columns_of(pipeline: TokenPipeline, arguments: argparse.Namespace) -> Condition:
    if arguments.prompt and arguments.class_labels:
        raise ValueError("name either --prompt or --class-labels")
    if pipeline.takes_prompts and not arguments.prompt:
        raise ValueError("this model is conditioned on text: say what to draw with --prompt")
    default = None if pipeline.takes_prompts else list(range(min(pipeline.num_classes, 10)))
    columns = arguments.prompt or arguments.class_labels or default
    return pipeline.encode_condition(columns, arguments.negative_prompt)


if __name__ == "__main__":
    main()
