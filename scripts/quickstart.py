"""The whole job: tokenizer, teacher, one-step student, export, measurements, report.

    python scripts/quickstart.py [--seed 0] [--thorough]                        # on the embedded digits, in minutes
    python scripts/quickstart.py --recipe mnist [--data FOLDER_OR_HUB_ID]       # through a VQ tokenizer, in an hour

Finished stages are kept: run it again to go on after an interruption. The last line of stdout is the summary.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from distill.command import run
from distill.config import load_config, to_yaml
from distill.student_job import load_job, load_student
from distill.teacher_job import TeacherJob
from eval.evaluate import Reference, generate
from eval.monitor import reference_for
from eval.report import quality_plot, side_by_side, write_report
from eval.speed import measure_speed, speed_table
from eval.tuning import Grid, tune_and_measure
from students.export import image_grid
from students.loading import load_pipeline
from students.pipeline import OneStepPipeline
from teachers.pipeline import MaskedDiffusionPipeline

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
RECIPES = ("digits", "mnist", "cifar10")


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
    run(lambda: Quickstart(parser.parse_intermixed_args()).run())


class Quickstart:
    """The stages, each of which is skipped where its result is there."""

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
        self.seconds_file = self.output / "seconds.json"

    def run(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        self.take_over(self.teacher_folder.parent.parent)
        if self.tokens and not self.teacher_folder.exists():
            self.stage("tokenizer", self.output / "tokenizer" / "tokenizer", self.train_tokenizer)
            self.stage("tokens", self.tokens / "index.json", self.cache_tokens)
        self.stage("teacher", self.teacher_folder, self.train_teacher)
        self.stage("distillation", self.student_run / "finished", self.train_student)
        reference = reference_for(self.data, self.classifier)
        self.stage("the teacher's measurement", self.teacher_rows, lambda: self.measure_teacher(reference))
        measurements = self.output / "measurements.json"
        self.stage("measurement", measurements, lambda: self.measure(reference, measurements))
        self.stage("export", self.student_folder, lambda: self.export(measurements))
        speed = self.output / "speed.json"
        self.stage("speed", speed, lambda: self.time(measurements, speed))
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

    def stage(self, name: str, result: Path, work: Any) -> None:
        seconds = json.loads(self.seconds_file.read_text()) if self.seconds_file.exists() else {}
        if result.exists():
            print(f"== {name}: {result} is there", flush=True)
            return
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        work()
        seconds[name] = seconds.get(name, 0) + time.perf_counter() - start
        self.seconds_file.write_text(json.dumps(seconds))
        print(f"== {name}: {seconds[name]:.0f} s", flush=True)

    def train_tokenizer(self) -> None:
        output = self.output / "tokenizer"
        self.launch("train_tokenizer.py", "tokenizer.yaml", output, *self.data_overrides("data."))
        if not (output / "tokenizer").exists():
            raise ValueError("the tokenizer's training was interrupted; run the same command again to go on")

    def cache_tokens(self) -> None:
        script = [sys.executable, str(Path(__file__).parent / "cache_tokens.py")]
        tokenizer = self.output / "tokenizer" / "tokenizer"
        subprocess.run(
            [*script, "--tokenizer", str(tokenizer), "--output", str(self.tokens), *self.data_overrides()], check=True
        )

    def train_teacher(self) -> None:
        overrides = self.data_overrides("data.") + ([f"tokens={self.tokens}"] if self.tokens else [])
        self.launch("train_teacher.py", "teacher.yaml", self.output / "teacher", *overrides)
        if not self.teacher_folder.exists():
            raise ValueError("the teacher's training was interrupted; run the same command again to go on")

    def train_student(self) -> None:
        overrides = [f"teacher={self.teacher_folder}", *self.data_overrides("monitor."), *self.overrides]
        self.launch("train_student.py", "student.yaml", self.student_run, *overrides)
        _, job, step = load_student(self.student_run)
        if step < job.training.num_steps:
            raise ValueError("the distillation was interrupted; run the same command again to go on")
        (self.student_run / "finished").touch()

    def data_overrides(self, prefix: str = "") -> list[str]:
        return [f"{prefix}{key}={value}" for key, value in asdict(self.data).items()]

    def launch(self, script: str, config: str, output: Path, *overrides: str) -> None:
        """`accelerate launch`: on the GPU if there is one, else on two CPU processes with a core each."""
        resume = any((output / "checkpoints").glob("step-*"))
        if not resume:
            shutil.rmtree(output, ignore_errors=True)  # what ended before its first checkpoint starts anew
        command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        environment = dict(os.environ)
        if torch.cuda.is_available():
            command += ["--num_processes", "1"]
        else:
            command += ["--cpu", "--num_processes", str(min(2, os.cpu_count() or 1))]
            command += ["--num_cpu_threads_per_process", "1"]
            environment["OMP_NUM_THREADS"] = "1"
        command += [str(Path(__file__).parent / script), "--config", str(self.configs / config), f"output={output}"]
        command += [f"training.seed={self.seed}", f"training.resume={str(resume).lower()}", *overrides]
        print("$ accelerate launch " + " ".join(command[3:]), flush=True)
        subprocess.run(command, env=environment, check=True)

    def measure_teacher(self, reference: Reference) -> None:
        teacher: MaskedDiffusionPipeline = load_pipeline(self.teacher_folder)
        rows = []
        for steps in self.grid.num_steps:
            settings = self.grid.teacher_settings(steps)
            row = tune_and_measure(teacher, settings, reference, self.grid, f"teacher, {steps} steps")
            rows.append({"steps": steps, **row})
        self.teacher_rows.write_text(json.dumps({"grid": self.grid_as_json(), "rows": rows}, indent=2))

    def measure(self, reference: Reference, path: Path) -> None:
        teacher: MaskedDiffusionPipeline = load_pipeline(self.teacher_folder)
        student, _, _ = load_student(self.student_run)
        untrained = OneStepPipeline(teacher.denoiser, teacher.tokenizer, student.initialiser)
        measured: dict[str, Any] = {"teacher": json.loads(self.teacher_rows.read_text())["rows"]}
        # The student is compared with the teacher's best where it is as faithful to its class, if it can be.
        best = min(measured["teacher"], key=lambda row: row["fd"])
        grid = replace(self.grid, num_tuning_images=self.grid.num_report_images)  # at one evaluation each, many
        for name, pipeline, least in [
            ("student", student, best["class_consistency"]),
            ("untrained_student", untrained, 0.0),
        ]:
            row = tune_and_measure(pipeline, grid.student_settings(), reference, grid, name, least)
            measured[name] = {"steps": 1, **row}
        measured["real_vs_real_fd"] = reference.split_half_distance()
        path.write_text(json.dumps(measured, indent=2))

    def export(self, measurements: Path) -> None:
        measured = json.loads(measurements.read_text())
        keys = ("steps", "nfe", "fd", "class_consistency", "precision", "recall")
        rows = [("student", measured["student"])] + [("teacher", row) for row in measured["teacher"]]
        table = self.output / "card.json"
        table.write_text(json.dumps([{"": name, **{key: row[key] for key in keys}} for name, row in rows]))
        command = [sys.executable, str(Path(__file__).parent / "export.py"), str(self.student_run)]
        command += ["--output", str(self.student_folder), "--measurements", str(table)]
        command += ["--temperature", str(measured["student"]["settings"]["temperature"])]
        command += ["--protocol", self.protocol()["Quality"]]
        subprocess.run(command, check=True)

    def time(self, measurements: Path, path: Path) -> None:
        measured = json.loads(measurements.read_text())
        teacher, student = load_pipeline(self.teacher_folder), load_pipeline(self.student_folder)
        untrained = OneStepPipeline(teacher.denoiser, teacher.tokenizer, student.initialiser)
        candidates = {"student": (student, {}), "untrained student": (untrained, {})}
        for row in measured["teacher"]:
            candidates[f"teacher, {row['steps']} steps"] = (teacher, row["settings"])
        rows = []
        for decode, batch_sizes in [(False, [1, 256]), (True, [1, 256])]:
            rows += measure_speed(candidates, batch_sizes=batch_sizes, num_repeats=7, decode=decode)
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
        seconds = json.loads(self.seconds_file.read_text())
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
        teacher, student = load_pipeline(self.teacher_folder), load_pipeline(self.student_folder)
        title = f"Teacher, {best['steps']} steps ({best['nfe']:g} evaluations)"
        return {
            title: image_grid(generate(teacher, 80, **best["settings"])[0], 10),
            "Student, one evaluation": image_grid(generate(student, 80)[0], 10),
        }

    def protocol(self) -> dict[str, str]:
        grid = self.grid
        return {
            "Quality": f"{grid.num_report_images} images for every row, against the real ones. Temperature "
            f"{grid.temperatures} and, for the teacher, guidance {grid.guidance_scales} chosen at each step count by "
            f"FD on another draw of {grid.num_tuning_images} images; the student's temperature on one of "
            f"{grid.num_report_images}, from those with which it is as faithful to its class as the teacher's best "
            "setting, unless none is.",
            "Speed": f"median of 7 interleaved rounds, images decoded, {torch.get_num_threads()} threads, torch "
            f"{torch.__version__}, {'GPU' if torch.cuda.is_available() else 'CPU'}; images per second at batch 256.",
            "Seed": str(self.seed),
        }


if __name__ == "__main__":
    main()
