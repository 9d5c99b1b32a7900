"""Make a picture of samples from a teacher or a one-step student.

python scripts/sample.py runs/digits/one-step --output grid.png
python scripts/sample.py runs/mine/one-step --class-labels cat dog --output grid.png
python scripts/sample.py runs/emoji/one-step --prompt "red apple" "waving hand, dark skin tone" --output grid.png
python scripts/sample.py DIR --class-labels cat dog --image photo.png --mask mask.png --output grid.png
python scripts/sample.py DIR --class-labels cat dog --image photo.png --strength 0.5 --output grid.png
"""

import argparse
import re
from pathlib import Path

import torch

from distill.jobs.command import run
from eval.files import format_of, write_picture
from eval.sampling import add_sampling_options, open_pipeline, sampling_settings
from students.export import example_conditions, image_grid
from teachers.conditions.condition import Condition
from teachers.pipeline import TokenPipeline
from teachers.randomness import sample_generators
from teachers.sources.pixels import open_image


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a picture of samples from a teacher or a one-step student.")
    parser.add_argument("pipeline", help="a MaskedDiffusionPipeline or OneStepPipeline: a folder, or a hub id")
    parser.add_argument("--output", type=Path, required=True, help="picture to write, a .png for instance")
    parser.add_argument(
        "--class-labels",
        type=class_label,
        nargs="+",
        help="numbers or names of classes, one column each; default: the first ten",
    )
    parser.add_argument("--prompt", nargs="+", help="one column each, for a model of text")
    parser.add_argument("--negative-prompt", help="of a teacher of text; default: its own")
    parser.add_argument("--num-rows", type=int, default=8)
    parser.add_argument("--image", type=Path, help="picture to complete (--mask) or to change (--strength)")
    parser.add_argument("--mask", type=Path, help="picture that is white where something new is to come")
    parser.add_argument("--strength", type=float, help="share of the picture's tokens that are new")
    add_sampling_options(parser)
    run(lambda: sample(parser.parse_args()))


def class_label(text: str) -> int | str:
    """A number is a class's number, anything else its name."""
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def sample(arguments: argparse.Namespace) -> None:
    format_of(arguments.output)  # before there are images to lose
    if arguments.num_rows < 1:
        raise ValueError(f"--num-rows {arguments.num_rows} must be at least 1")
    if (arguments.image is not None) != ((arguments.mask is not None) + (arguments.strength is not None)):
        raise ValueError(
            "an --image is completed where a --mask says so, or changed with a --strength: name one of them"
        )
    pipeline = open_pipeline(arguments.pipeline, arguments)
    columns = columns_of(pipeline, arguments)
    settings = sampling_settings(pipeline, arguments)
    condition = columns.select(torch.arange(len(columns)).repeat(arguments.num_rows))
    generator = sample_generators("sample", arguments.seed, places=range(len(condition)))
    settings |= {"condition": condition, "generator": generator, "output_type": "pt"}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    if arguments.image is None:
        output = pipeline(**settings)
    elif arguments.mask is not None:
        output = pipeline.inpaint(open_image(arguments.image), open_image(arguments.mask), **settings)
    else:
        output = pipeline.image_to_image(open_image(arguments.image), strength=arguments.strength, **settings)
    write_picture(arguments.output, image_grid(output.images, len(columns)))
    print(f"wrote {arguments.output}: {len(condition)} images, {output.nfe:g} network evaluations each")


def columns_of(pipeline: TokenPipeline, arguments: argparse.Namespace) -> Condition:
    if arguments.prompt and arguments.class_labels:
        raise ValueError("name either --prompt or --class-labels")
    columns = arguments.prompt or arguments.class_labels or example_conditions(pipeline)
    return pipeline.encode_condition(columns, arguments.negative_prompt)


if __name__ == "__main__":
    main()
