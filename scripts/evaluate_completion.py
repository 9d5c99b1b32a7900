"""Measure how teachers and students complete real images of which they are shown a part.

    python scripts/evaluate_completion.py --teacher runs/digits/teacher/pipeline \\
        --students runs/digits-completing/one-step runs/digits/one-step --output runs/digits/completion
    python scripts/evaluate_completion.py --teacher runs/mnist/teacher/pipeline --output runs/mnist/completion \\
        --students runs/mnist-completing/one-step name=ylecun/mnist split=train --shown-split test

The last line of stdout is one JSON object.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.jobs.command import run
from eval.completion import HIDDEN, completion_picture, completion_table, hidden, measure_completion, untouched
from eval.evaluate import spread
from eval.files import write_json, write_picture
from eval.real import data_like, make_features, make_reference, names_size, settings_like
from eval.sampling import add_device_options, open_pipeline
from eval.tuning import Grid
from teachers.pipeline import MaskedDiffusionPipeline


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure how pipelines complete real images, of which a part is shown."
    )
    parser.add_argument(
        "data", nargs="*", metavar="key=value", help="the real images to compare with, e.g. name=folder"
    )
    parser.add_argument("--teacher", required=True, help="a MaskedDiffusionPipeline: a folder, or a hub id")
    parser.add_argument("--students", nargs="+", default=[], help="OneStepPipelines: folders, or hub ids")
    parser.add_argument("--output", type=Path, required=True, help="folder for the figures and pictures")
    parser.add_argument("--shown-split", help="of the images that are completed; default: that of the real ones")
    parser.add_argument("--num-images", type=int, default=2000, help="of those, spread over all")
    parser.add_argument(
        "--num-tuning-images", type=int, default=1000, help="to choose the settings by, on another draw"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="of the teacher")
    parser.add_argument("--guidance-scales", type=float, nargs="+", default=[1.0, 1.25], help="of the teacher")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.8, 0.6, 0.4])
    parser.add_argument("--classifier", type=Path, default=Path("runs/classifier"), help="where it is kept")
    add_device_options(parser)
    arguments = parser.parse_intermixed_args()
    run(lambda: evaluate(arguments))


def evaluate(arguments: argparse.Namespace) -> None:
    teacher = open_pipeline(arguments.teacher, arguments)
    if teacher.condition_kind != "classes" or not isinstance(teacher, MaskedDiffusionPipeline):
        raise ValueError(f"{arguments.teacher} is no teacher of classes")
    arguments.output.mkdir(parents=True, exist_ok=True)
    config = settings_like(teacher, arguments.data)
    split = arguments.shown_split or config.split
    shown = data_like(teacher, replace(config, split=split), may_enlarge=names_size(arguments.data))
    reference = make_reference(
        make_features(config, arguments.classifier, device=teacher.device, class_names=teacher.class_names), config
    )
    shown = shown.subset(spread(len(shown), arguments.num_images))
    images = shown.images("images to complete")
    temperatures = tuple(arguments.temperatures)
    grid = Grid(temperatures, tuple(arguments.guidance_scales), (), arguments.num_tuning_images, len(images))
    candidates = [(name, open_pipeline(name, arguments), grid.student_settings()) for name in arguments.students]
    candidates += [(f"teacher, {steps} steps", teacher, grid.teacher_settings(steps)) for steps in arguments.steps]

    rows: list[dict[str, Any]] = []
    for part in HIDDEN:
        mask, made = hidden(part, *images.shape[-2:]), []
        rows.append(
            {"hidden": part, "name": "nothing new", **untouched(teacher, images, shown.labels, mask, reference)}
        )
        for name, pipeline, settings in candidates:
            row, completed = measure_completion(
                pipeline, settings, images, shown.labels, mask, reference, grid.num_tuning_images, f"{part}: {name}"
            )
            rows.append({"hidden": part, "name": name, **row})
            made.append(completed)
            print(completion_table(rows[-1:]), flush=True)
        picture = arguments.output / f"{part.replace(' ', '-')}.png"
        write_picture(picture, completion_picture(images, mask, made))
    protocol = {"reference": reference.source, "num_images": len(images), "shown_split": split}
    write_json(arguments.output / "completion.json", {"rows": rows, "protocol": protocol})
    print(f"\n{completion_table(rows)}\n\npictures: {arguments.output}")
    print(json.dumps({"rows": rows, "protocol": protocol}))


if __name__ == "__main__":
    main()
