"""The whole job: tokenizer, teacher, one-step student, export, measurements, report.

    python scripts/quickstart.py [--seed 0] [--thorough]                        # on the embedded digits, in minutes
    python scripts/quickstart.py --recipe mnist [--data FOLDER_OR_HUB_ID]       # through a VQ tokenizer, in an hour
    python scripts/quickstart.py --recipe emoji --data FOLDER_OR_HUB_ID         # from captions

Finished stages are kept: run it again to go on after an interruption. The last line of stdout is the summary.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill.config import load_config, to_yaml
from distill.jobs.command import run
from distill.jobs.stages import Stages, launch
from distill.jobs.student import load_job, load_student
from distill.jobs.teacher import TeacherJob
from eval.clip_score import ClipFeatures
from eval.evaluate import Reference, generate
from eval.monitor import real_images, reference_for
from eval.report import quality_plot, side_by_side, text_column, write_report
from eval.speed import measure_speed, speed_table
from eval.tuning import Grid, tune_and_measure
from students.export import image_grid
from students.loading import load_pipeline
from students.pipeline import OneStepPipeline
from teachers.conditions.condition import Conditions
from teachers.conditions.prompts import PromptConfig, Prompts, load_prompts
from teachers.data import load_data
from teachers.pipeline import MaskedDiffusionPipeline, TokenPipeline, all_classes

QUICK = Grid(
    temperatures=(1.0, 0.8, 0.6, 0.4),
    guidance_scales=(1.0, 1.25),
    num_steps=(1, 2, 4, 8, 16),
    num_tuning_images=1000,
    num_report_images=2000,
)
THOROUGH = Grid(
    temperatures=(1.0, 0.8, 0.6, 0.5, 0.4),
    guidance_scales=(1.0, 1.25, 1.5),
    num_steps=(1, 2, 4, 8, 16),
    num_tuning_images=5000,
    num_report_images=5000,
)
OWN_DATA = replace(QUICK, guidance_scales=(1.0, 1.25, 1.5), num_tuning_images=2000, num_report_images=5000)
CONFIGS = Path(__file__).parent.parent / "configs"
CAPTIONS = Grid(
    temperatures=(0.8, 0.6, 0.4),
    guidance_scales=(1.0, 1.5),
    num_steps=(4, 8, 16),
    num_tuning_images=354,
    num_report_images=708,
)
SCRIPTS = Path(__file__).parent
RECIPES = ("digits", "mnist", "cifar10", "emoji")


def main() -> None:
    parser = argparse.ArgumentParser(description="The whole job, from images to a measured one-step student.")
    parser.add_argument("--recipe", choices=RECIPES, default="digits", help="the folder of configs/ to follow")
    parser.add_argument("--data", help="the images, instead of the recipe's data.name")
    parser.add_argument("--image-column", help="the column with the images, instead of the recipe's")
    parser.add_argument("--output", type=Path, help="default: runs/RECIPE")
    parser.add_argument("--teacher", type=Path, help="distil this pipeline folder instead of training a teacher")
    parser.add_argument("--seed", type=int, default=0, help="of teacher and student training")
    parser.add_argument("--thorough", action="store_true", help="5,000 images and a finer grid")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the student's job")
    run(lambda: start(parser.parse_intermixed_args()))


def start(arguments: argparse.Namespace) -> None:
    captioned = (CONFIGS / arguments.recipe / "clip.yaml").exists()
    (CaptionQuickstart if captioned else Quickstart)(arguments).run()


class Quickstart:
    """The stages, for a teacher conditioned on classes."""

    faithfulness, allowance = "class_consistency", 0.0  # the student's may be so much below the teacher's best
    timed_batch = 256  # what images per second are counted at, beside batches of 1

    def __init__(self, arguments: argparse.Namespace):
        self.seed, self.overrides = arguments.seed, arguments.overrides
        self.configs = CONFIGS / arguments.recipe
        self.data = load_config(TeacherJob, self.configs / "teacher.yaml").data
        if arguments.data:
            self.data = replace(self.data, name=arguments.data)
        if arguments.image_column:
            self.data = replace(self.data, image_column=arguments.image_column)
        self.output = arguments.output or Path("runs") / arguments.recipe
        self.teacher_folder = arguments.teacher or self.output / "teacher" / "pipeline"
        self.classifier = self.output / "classifier"
        self.teacher_rows = self.output / "teacher_measurements.json"
        self.tokens = self.output / "tokens" if (self.configs / "tokenizer.yaml").exists() else None
        self.grid = THOROUGH if arguments.thorough else OWN_DATA if self.tokens else QUICK
        self.student_run = self.output / "student"
        self.student_folder = self.output / "one-step"
        self.stages = Stages(self.output)

    def run(self) -> None:
        stage = self.stages.run
        self.take_over(self.teacher_folder.parent.parent)
        if self.tokens and not self.teacher_folder.exists():
            stage("tokenizer", self.output / "tokenizer" / "tokenizer", self.train_tokenizer)
            stage("tokens", self.tokens / "index.json", self.cache_tokens)
        self.prepare()
        stage("teacher", self.teacher_folder, self.train_teacher)
        stage("distillation", self.student_run / "finished", self.train_student)
        reference = self.reference()
        stage("the teacher's measurement", self.teacher_rows, lambda: self.measure_teacher(reference))
        measurements = self.output / "measurements.json"
        stage("measurement", measurements, lambda: self.measure(reference, measurements))
        stage("export", self.student_folder, lambda: self.export(measurements))
        speed = self.output / "speed.json"
        stage("speed", speed, lambda: self.time(measurements, speed))
        summary = self.summarise(reference, measurements, speed)
        print(f"\nreport: {self.output / 'report.html'}")
        print(json.dumps(summary))

    def take_over(self, run: Path) -> None:
        """From the run that trained the teacher: its measurements, if they were as careful, and the classifier.

        Figures compare only through one classifier.
        """
        rows = run / self.teacher_rows.name
        if (run / "classifier").exists() and not self.classifier.exists():
            shutil.copytree(run / "classifier", self.classifier)
            if rows.exists() and json.loads(rows.read_text())["grid"] == self.grid_as_json():
                shutil.copy(rows, self.teacher_rows)

    def grid_as_json(self) -> Any:
        return json.loads(json.dumps(asdict(self.grid)))

    def prepare(self) -> None:
        """What the teacher needs besides tokens."""

    def reference(self) -> Reference:
        return reference_for(self.data, self.classifier)

    def conditions(self, pipeline: TokenPipeline) -> Conditions:
        """What images are made from, to be measured."""
        return all_classes(pipeline)

    def columns(self) -> list[str] | None:
        """The prompts that the model card shows samples of; none: all classes."""
        return None

    def train_tokenizer(self) -> None:
        self.launch("train_tokenizer.py", "tokenizer.yaml", self.output / "tokenizer", *self.data_overrides("data."))
        if not (self.output / "tokenizer" / "tokenizer").exists():
            raise ValueError("the tokenizer's training was interrupted; run the same command again to go on")

    def cache_tokens(self) -> None:
        script = [sys.executable, str(SCRIPTS / "cache_tokens.py")]
        tokenizer = self.output / "tokenizer" / "tokenizer"
        subprocess.run(
            [*script, "--tokenizer", str(tokenizer), "--output", str(self.tokens), *self.data_overrides()], check=True
        )

    def train_teacher(self, *more: str) -> None:
        overrides = self.data_overrides("data.") + ([f"tokens={self.tokens}"] if self.tokens else [])
        self.launch("train_teacher.py", "teacher.yaml", self.output / "teacher", *overrides, *more)
        if not self.teacher_folder.exists():
            raise ValueError("the teacher's training was interrupted; run the same command again to go on")

    def train_student(self, *more: str) -> None:
        overrides = [f"teacher={self.teacher_folder}", *self.data_overrides("monitor."), *more, *self.overrides]
        self.launch("train_student.py", "student.yaml", self.student_run, *overrides)
        _, job, step = load_student(self.student_run)
        if step < job.training.num_steps:
            raise ValueError("the distillation was interrupted; run the same command again to go on")
        (self.student_run / "finished").touch()

    def data_overrides(self, prefix: str = "") -> list[str]:
        return [f"{prefix}{key}={value}" for key, value in asdict(self.data).items()]

    def launch(self, script: str, config: str, output: Path, *overrides: str) -> None:
        launch(SCRIPTS / script, self.configs / config, output, f"training.seed={self.seed}", *overrides)

    def measure_teacher(self, reference: Reference) -> None:
        teacher: MaskedDiffusionPipeline = load_pipeline(self.teacher_folder)
        rows = []
        for steps in self.grid.num_steps:
            settings = self.grid.teacher_settings(steps)
            name, conditions = f"teacher, {steps} steps", self.conditions(teacher)
            row = tune_and_measure(teacher, settings, reference, self.grid, name, conditions=conditions)
            rows.append({"steps": steps, **row})
        self.teacher_rows.write_text(json.dumps({"grid": self.grid_as_json(), "rows": rows}, indent=2))

    def measure(self, reference: Reference, path: Path) -> None:
        teacher: MaskedDiffusionPipeline = load_pipeline(self.teacher_folder)
        student, _, _ = load_student(self.student_run)
        untrained = self.untrained(teacher, student)
        measured: dict[str, Any] = {"teacher": json.loads(self.teacher_rows.read_text())["rows"]}
        # The student is compared with the teacher's best where it is as faithful to its conditions, if it can be.
        best = min(measured["teacher"], key=lambda row: row["fd"])
        grid = replace(self.grid, num_tuning_images=self.grid.num_report_images)  # at one evaluation each, many
        for name, pipeline, at_least in [
            ("student", student, {self.faithfulness: best[self.faithfulness] - self.allowance}),
            ("untrained_student", untrained, {}),
        ]:
            conditions = self.conditions(pipeline)
            row = tune_and_measure(pipeline, grid.student_settings(), reference, grid, name, at_least, conditions)
            measured[name] = {"steps": 1, **row}
        measured["real_vs_real_fd"] = reference.split_half_distance()
        path.write_text(json.dumps(measured, indent=2))

    def untrained(self, teacher: MaskedDiffusionPipeline, student: OneStepPipeline) -> OneStepPipeline:
        return OneStepPipeline(
            teacher.denoiser, teacher.tokenizer, student.initialiser, teacher.text_encoder, teacher.text_tokenizer
        )

    def export(self, measurements: Path) -> None:
        measured = json.loads(measurements.read_text())
        keys = ("steps", "nfe", "fd", self.faithfulness, "precision", "recall")
        rows = [("student", measured["student"])] + [("teacher", row) for row in measured["teacher"]]
        table = self.output / "card.json"
        table.write_text(json.dumps([{"": name, **{key: row[key] for key in keys}} for name, row in rows]))
        command = [sys.executable, str(SCRIPTS / "export.py"), str(self.student_run)]
        command += ["--output", str(self.student_folder), "--measurements", str(table)]
        command += ["--temperature", str(measured["student"]["settings"]["temperature"])]
        command += ["--protocol", self.protocol()["Quality"]]
        command += ["--prompts", *columns] if (columns := self.columns()) else []
        subprocess.run(command, check=True)

    def time(self, measurements: Path, path: Path) -> None:
        measured = json.loads(measurements.read_text())
        teacher, student = load_pipeline(self.teacher_folder), load_pipeline(self.student_folder)
        untrained = self.untrained(teacher, student)
        candidates = {"student": (student, {}), "untrained student": (untrained, {})}
        for row in measured["teacher"]:
            candidates[f"teacher, {row['steps']} steps"] = (teacher, row["settings"])
        rows = []
        for decode in (False, True):
            batch_sizes, conditions = [1, self.timed_batch], self.conditions(teacher)
            rows += measure_speed(
                candidates, batch_sizes=batch_sizes, num_repeats=7, decode=decode, conditions=conditions
            )
        print(speed_table(rows))
        path.write_text(json.dumps(rows, indent=2))

    def summarise(self, reference: Reference, measurements: Path, speed: Path) -> dict[str, Any]:
        summary, rows = json.loads(measurements.read_text()), json.loads(speed.read_text())
        decoded = [row for row in rows if row["decode"] and row["batch_size"] > 1]
        throughput = {row["name"]: row["images_per_second"] for row in decoded}
        for row in summary["teacher"]:
            row["images_per_second"] = throughput[f"teacher, {row['steps']} steps"]
        summary["student"]["images_per_second"] = throughput["student"]
        summary["untrained_student"]["images_per_second"] = throughput["untrained student"]
        for row in [*summary["teacher"], summary["student"], summary["untrained_student"]]:
            del row["tuning"]
        best = min(summary["teacher"], key=lambda row: row["fd"])
        summary["best_teacher"] = best
        summary["speedup_vs_best_teacher"] = summary["student"]["images_per_second"] / best["images_per_second"]
        seconds = self.stages.seconds
        summary["wall_seconds"] = seconds | {"total": sum(seconds.values())}
        summary["protocol"] = self.protocol() | {
            "Features": reference.features.name,
            "Real images": f"{len(reference.real_features)} of {self.data.name}",
        }

        samples = self.samples(best)
        side_by_side(samples).save(self.output / "samples.png")
        quality_plot(summary).save(self.output / "quality.png")
        write_report(
            self.output / "report.html",
            summary=summary,
            speed=rows,
            samples=samples,
            settings={
                "Teacher": (self.teacher_folder.parent / "config.yaml").read_text(),
                "Student": to_yaml(load_job(self.student_run)),
            },
            protocol=summary["protocol"],
        )
        (self.output / "summary.json").write_text(json.dumps(summary, indent=2))
        return summary

    def samples(self, best: dict[str, Any]) -> dict[str, Any]:
        pictures = {}
        for name, folder, settings in self.candidates(best):
            pipeline = load_pipeline(folder)
            conditions = all_classes(pipeline)
            images, _, _ = generate(pipeline, 8 * len(conditions), conditions=conditions, **settings)
            pictures[name] = image_grid(images, len(conditions))
        return pictures

    def candidates(self, best: dict[str, Any]) -> list[tuple[str, Path, dict[str, Any]]]:
        """Title, folder and settings of the teacher at its best, and of the student."""
        title = f"Teacher, {best['steps']} steps ({best['nfe']:g} evaluations)"
        return [(title, self.teacher_folder, best["settings"]), ("Student, one evaluation", self.student_folder, {})]

    def protocol(self) -> dict[str, str]:
        grid = self.grid
        return {
            "Quality": f"{grid.num_report_images} images for every row, against the real ones. Temperature "
            f"{grid.temperatures} and, for the teacher, guidance {grid.guidance_scales} chosen at each step count by "
            f"FD on another draw of {grid.num_tuning_images} images; the student's temperature on one of "
            f"{grid.num_report_images}, from those whose {self.faithfulness.replace('_', ' ')} is not below that of "
            f"the teacher's best setting{f' by more than {self.allowance}' if self.allowance else ''}, unless none is.",
            "Speed": f"median of 7 interleaved rounds, images decoded, {torch.get_num_threads()} threads, torch "
            f"{torch.__version__}, {'GPU' if torch.cuda.is_available() else 'CPU'}; images per second at batch "
            f"{self.timed_batch}.",
            "Seed": str(self.seed),
        }


class CaptionQuickstart(Quickstart):
    """The stages for a teacher conditioned on captions: a CLIP for its prompts, and another one that scores."""

    faithfulness, allowance = "clip_score", 0.02
    timed_batch = 32

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments)
        self.grid = CAPTIONS
        self.test_data = replace(self.data, split="test")
        self.prompts = PromptConfig(self.data.name, "test", self.data.text_column)

    def prepare(self) -> None:
        for name, seed in [("clip", self.seed), ("scoring-clip", self.seed + 1000)]:
            output = self.output / name
            self.stages.run(name.replace("-", " "), output / "clip", partial(self.train_clip, output, seed))

    def train_clip(self, output: Path, seed: int) -> None:
        overrides = [*self.data_overrides("data."), f"monitor.name={self.data.name}", f"training.seed={seed}"]
        launch(SCRIPTS / "train_clip.py", self.configs / "clip.yaml", output, *overrides)
        if not (output / "clip").exists():
            raise ValueError("the CLIP's training was interrupted; run the same command again to go on")

    def train_teacher(self, *more: str) -> None:
        scoring = f"scoring_clip={self.output / 'scoring-clip' / 'clip'}"
        super().train_teacher(f"text_encoder={self.output / 'clip' / 'clip'}", scoring, *more)

    def train_student(self, *more: str) -> None:
        prompts = [f"prompts.name={self.data.name}", f"prompts.column={self.data.text_column}"]
        super().train_student(*prompts, f"scoring_clip={self.output / 'scoring-clip' / 'clip'}", *more)

    def reference(self) -> Reference:
        scoring = ClipFeatures.load(self.output / "scoring-clip" / "clip", load_prompts(self.prompts))
        return Reference(scoring, real_images(self.data))

    def conditions(self, pipeline: TokenPipeline) -> Conditions:
        return Prompts(pipeline, load_prompts(self.prompts))

    def columns(self) -> list[str] | None:
        return load_prompts(self.prompts)[:10]

    def summarise(self, reference: Reference, measurements: Path, speed: Path) -> dict[str, Any]:
        images = real_images(self.test_data)
        real = reference.measure(images, torch.arange(len(images)))
        measured = json.loads(measurements.read_text())
        real |= {"nfe": 0, "settings": {}}
        measurements.write_text(json.dumps(measured | {"real_test_images": real}, indent=2))
        return super().summarise(reference, measurements, speed)

    def samples(self, best: dict[str, Any]) -> dict[str, Any]:
        """The first prompts of the test split, their own images, and four of the teacher and of the student."""
        prompts, num_images = load_prompts(self.prompts)[:12], 4
        pictures = {"Test image": image_grid(load_data(self.test_data).images()[: len(prompts)], 1)}
        for name, folder, settings in self.candidates(best):
            pipeline = load_pipeline(folder)
            repeated = [prompt for prompt in prompts for _ in range(num_images)]
            images, _, _ = generate(pipeline, len(repeated), conditions=Prompts(pipeline, repeated), **settings)
            pictures[name] = image_grid(images, num_images)
        texts = text_column(prompts, pictures["Test image"].height // len(prompts))
        return {"Prompts of the test split": side_by_side({"": texts, **pictures})}


if __name__ == "__main__":
    main()
