"""Export a distilled student as a OneStepPipeline folder.

python scripts/export.py runs/digits/student --output runs/digits/one-step
"""

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path

import diffusers
import torch

from distill.jobs.command import run
from distill.jobs.student import load_student
from distill.methods import METHODS
from students.export import export_student
from teachers.conditions.prompts import load_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a distilled student as a OneStepPipeline folder.")
    parser.add_argument("run", type=Path, help="folder of a distillation run")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must be empty or not exist")
    parser.add_argument("--temperature", type=float, default=1.0, help="default temperature of the tokens")
    parser.add_argument("--measurements", type=Path, help="JSON list of rows for the model card's table")
    parser.add_argument("--prompts", nargs="+", help="for the picture of a student of text; default: the first it saw")
    parser.add_argument("--protocol", default="", help="a sentence on how they were measured, for the model card")
    parser.add_argument("--teacher", default="", help="of the run, where it was moved: a folder or hub id")
    parser.add_argument("--best", action="store_true", help="the checkpoint that measured best, not the newest")
    run(lambda: export(parser.parse_args()))


def export(arguments: argparse.Namespace) -> None:
    pipeline, job, step = load_student(arguments.run, arguments.best, arguments.teacher)
    pipeline.register_to_config(temperature=arguments.temperature)
    measurements = json.loads(arguments.measurements.read_text()) if arguments.measurements else []
    metadata = {
        "teacher": job.teacher,
        "steps": str(step),
        "batch_size": str(job.training.batch_size),
        "seed": str(job.training.seed),
        "settings": json.dumps(asdict(job.method) | asdict(job.initial)),
        "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}, Python {platform.python_version()}",
    }
    prompts = arguments.prompts
    if pipeline.condition_kind == "text" and not prompts:
        prompts = load_prompts(job.prompts)
    export_student(
        pipeline,
        arguments.output,
        method=METHODS[job.method.name],
        metadata=metadata,
        measurements=measurements,
        protocol=arguments.protocol,
        prompts=prompts,
    )
    print(f"wrote {arguments.output}: read back, with the same logits")


if __name__ == "__main__":
    main()
