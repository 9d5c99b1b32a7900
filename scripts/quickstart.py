"""The whole job: tokenizer, teacher, one-step student, export, measurements, report.

    python scripts/quickstart.py [--seed 0] [--thorough]                        # on the embedded digits, in minutes
    python scripts/quickstart.py --recipe mnist [--data FOLDER_OR_HUB_ID]       # through a VQ tokenizer, in an hour
    python scripts/quickstart.py --recipe emoji --data FOLDER_OR_HUB_ID         # from captions

Finished stages are kept: run it again to go on after an interruption. The last line of stdout is the summary.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from distill.config import to_yaml
from distill.jobs.command import run
from distill.jobs.recipe import Recipe
from distill.jobs.run import CONFIG
from distill.jobs.stages import call
from distill.jobs.student import load_job, load_student
from distill.methods import METHODS
from eval.comparison import CAPTIONS, OWN_DATA, QUICK, THOROUGH, CaptionComparison, Comparison
from students.loading import load_pipeline

SCRIPTS = Path(__file__).parent
CONFIGS = SCRIPTS.parent / "configs"
RECIPES = ("digits", "mnist", "cifar10", "emoji")


def main() -> None:
    parser = argparse.ArgumentParser(description="The whole job, from images to a measured one-step student.")
    parser.add_argument("--recipe", choices=RECIPES, default="digits", help="the folder of configs/ to follow")
    parser.add_argument("--data", default="", help="the images, instead of the recipe's data.name")
    parser.add_argument("--image-column", default="", help="the column with the images, instead of the recipe's")
    parser.add_argument("--output", type=Path, help="default: runs/RECIPE")
    parser.add_argument("--teacher", type=Path, help="distil this pipeline folder instead of training a teacher")
    parser.add_argument("--seed", type=int, default=0, help="of teacher and student training")
    parser.add_argument("--thorough", action="store_true", help="5,000 images and a finer grid")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the student's job")
    run(lambda: start(parser.parse_intermixed_args()))


def start(arguments: argparse.Namespace) -> None:
    output = arguments.output or Path("runs") / arguments.recipe
    if arguments.teacher and not arguments.teacher.is_dir():
        raise FileNotFoundError(f"there is no folder {arguments.teacher} with a teacher (--teacher)")
    recipe = Recipe(
        CONFIGS / arguments.recipe,
        SCRIPTS,
        output,
        arguments.seed,
        arguments.data,
        arguments.image_column,
        arguments.teacher,
        arguments.overrides,
    )
    if recipe.captioned:
        comparison = CaptionComparison(output, recipe.images, CAPTIONS, arguments.seed, recipe.scoring_clip)
    else:
        grid = THOROUGH if arguments.thorough else OWN_DATA if recipe.tokens else QUICK
        comparison = Comparison(output, recipe.images, grid, arguments.seed)
    comparison.take_over(recipe.teacher_folder.parent.parent)
    recipe.train()

    stage, one_step = recipe.stages.run, output / "one-step"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_pipeline(recipe.teacher_folder).to(device)
    reference, job = comparison.reference(teacher), load_job(recipe.student_run)

    def measure() -> None:
        student, _, _ = load_student(recipe.student_run)
        comparison.measure(teacher, student.to(device), reference)

    stage("the teacher's measurement", comparison.teacher_rows, lambda: comparison.measure_teacher(teacher, reference))
    stage("measurement", comparison.measurements, measure)
    stage("export", one_step, lambda: export(recipe, comparison, one_step))
    exported = load_pipeline(one_step).to(device)
    stage("speed", comparison.speed, lambda: comparison.time(teacher, exported))
    summary = comparison.summarise(
        teacher,
        exported,
        reference,
        method=METHODS[job.method.name],
        settings=settings_of_the_teacher(recipe) | {"Student": to_yaml(job)},
        seconds=recipe.stages.seconds,
    )
    print(f"\nreport: {output / 'report.html'}")
    print(json.dumps(summary))


def settings_of_the_teacher(recipe: Recipe) -> dict[str, str]:
    """What it was trained with, where its folder is a run's."""
    path = recipe.teacher_folder.parent / CONFIG
    return {"Teacher": path.read_text()} if path.is_file() else {}


def export(recipe: Recipe, comparison: Comparison, one_step: Path) -> None:
    table = recipe.output / "card.json"
    table.write_text(json.dumps(comparison.card_rows()))
    command = [sys.executable, str(SCRIPTS / "export.py"), str(recipe.student_run), "--output", str(one_step)]
    command += ["--measurements", str(table), "--protocol", comparison.protocol()["Quality"]]
    command += ["--temperature", str(comparison.student_temperature())]
    command += ["--prompts", *prompts] if (prompts := comparison.prompts()) else []
    call(command)


if __name__ == "__main__":
    main()
