"""A student against its teacher: both tuned, measured, timed; a summary, pictures and a page of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from eval.clip_score import ClipFeatures
from eval.distances import MIN_SAMPLES, check_num_samples
from eval.evaluate import Reference, generate
from eval.files import write_json, write_picture, write_text
from eval.real import data_like, embed, like, make_features, make_reference
from eval.report import quality_plot, side_by_side, text_column, write_report
from eval.speed import measure_speed, speed_table
from eval.tuning import Grid, tune_and_measure
from students.export import Credits, image_grid
from students.pipeline import OneStepPipeline
from teachers.conditions.condition import Conditions
from teachers.conditions.prompts import PromptConfig, Prompts, load_prompts
from teachers.cost import machine
from teachers.data import DataConfig, ImageData, load_data
from teachers.folder import new_folder
from teachers.guidance import check_guidance
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
CAPTIONS = Grid(
    temperatures=(0.8, 0.6, 0.4),
    guidance_scales=(1.0, 1.5),
    num_steps=(4, 8, 16),
    num_tuning_images=354,
    num_report_images=708,
)


class Comparison:
    """What is measured of a teacher of classes and its student, kept in files of a folder."""

    faithfulness, allowance = "class_consistency", 0.0  # the student's may be so much below the teacher's best
    timed_batch = 256  # what images per second are counted at, beside batches of 1

    def __init__(self, output: Path, data: DataConfig, grid: Grid, seed: int):
        self.output, self.data, self.grid, self.seed = output, data, grid, seed
        self.classifier = output / "classifier"
        self.teacher_rows = output / "teacher_measurements.json"
        self.measurements = output / "measurements.json"
        self.speed = output / "speed.json"

    def take_over(self, run: Path) -> None:
        """From the run that trained the teacher: its measurements, if they were as careful, and the classifier.

        Figures compare only through one classifier.
        """
        rows = run / self.teacher_rows.name
        if (run / "classifier").exists() and not self.classifier.exists():
            with new_folder(self.classifier) as staging:
                shutil.copytree(run / "classifier", staging, dirs_exist_ok=True)
            if rows.exists() and json.loads(rows.read_text())["grid"] == self._grid_as_json():
                write_text(self.teacher_rows, rows.read_text())

    def reference(self, pipeline: TokenPipeline) -> Reference:
        """What a pipeline's images are compared with, seen through features on its device."""
        config, names = like(pipeline, self.data), pipeline.class_names
        data_like(pipeline, config)  # or it says what is wrong
        features = make_features(config, self.classifier, device=pipeline.device, class_names=names)
        return make_reference(features, config)

    def conditions(self, pipeline: TokenPipeline) -> Conditions:
        """What images are made from, to be measured."""
        return all_classes(pipeline)

    def prompts(self) -> list[str] | None:
        """The prompts that the model card shows samples of; none: all classes."""
        return None

    def measure_teacher(self, teacher: MaskedDiffusionPipeline, reference: Reference) -> None:
        """The teacher at its best at each step count, into `teacher_rows`."""
        for guidance_scale in self.grid.guidance_scales:
            check_guidance(teacher.denoiser, guidance_scale)
        rows = []
        for steps in self.grid.num_steps:
            settings = self.grid.teacher_settings(steps)
            name, conditions = f"teacher, {steps} steps", self.conditions(teacher)
            row = tune_and_measure(teacher, settings, reference, self.grid, name, conditions=conditions)
            rows.append({"steps": steps, **row})
        write_json(self.teacher_rows, {"grid": self._grid_as_json(), "features": reference.features.name, "rows": rows})

    def measure(self, teacher: MaskedDiffusionPipeline, student: OneStepPipeline, reference: Reference) -> None:
        """The student at its best, and as it was before distillation, beside the teacher, into `measurements`.

        A teacher that was measured through other features, as of a classifier that was trained anew, is measured again.
        """
        name = reference.features.name
        if json.loads(self.teacher_rows.read_text()).get("features", name) != name:
            self.measure_teacher(teacher, reference)
        measured: dict[str, Any] = {"teacher": json.loads(self.teacher_rows.read_text())["rows"]}
        # The student is compared with the teacher's best where it is as faithful to its conditions, if it can be.
        best = min(measured["teacher"], key=lambda row: row["fd"])
        grid = replace(self.grid, num_tuning_images=self.grid.num_report_images)  # at one evaluation each, many
        for name, pipeline, at_least in [
            ("student", student, {self.faithfulness: best[self.faithfulness] - self.allowance}),
            ("untrained_student", untrained(teacher, student), {}),
        ]:
            conditions = self.conditions(pipeline)
            row = tune_and_measure(pipeline, grid.student_settings(), reference, grid, name, at_least, conditions)
            measured[name] = {"steps": 1, **row}
        measured["real_vs_real_fd"] = reference.split_half_distance()
        write_json(self.measurements, measured)

    def card_rows(self) -> list[dict[str, Any]]:
        """The rows of the model card's table."""
        measured = json.loads(self.measurements.read_text())
        keys = ("steps", "nfe", "fd", self.faithfulness, "precision", "recall")
        rows = [("student", measured["student"])] + [("teacher", row) for row in measured["teacher"]]
        return [{"": name, **{key: row[key] for key in keys}} for name, row in rows]

    def student_temperature(self) -> float:
        return json.loads(self.measurements.read_text())["student"]["settings"]["temperature"]

    def time(self, teacher: MaskedDiffusionPipeline, student: OneStepPipeline) -> None:
        """Student, untrained student and teacher at its best settings, with and without decoding, into `speed`."""
        measured = json.loads(self.measurements.read_text())
        candidates: dict[str, tuple[TokenPipeline, dict[str, Any]]] = {
            "student": (student, {}),
            "untrained student": (untrained(teacher, student), {}),
        }
        for row in measured["teacher"]:
            candidates[f"teacher, {row['steps']} steps"] = (teacher, row["settings"])
        rows = []
        for decode in (False, True):
            batch_sizes, conditions = [1, self.timed_batch], self.conditions(teacher)
            rows += measure_speed(
                candidates, batch_sizes=batch_sizes, num_repeats=7, decode=decode, conditions=conditions
            )
        print(speed_table(rows))
        write_json(self.speed, rows)

    def summarise(
        self,
        teacher: MaskedDiffusionPipeline,
        student: OneStepPipeline,
        reference: Reference,
        *,
        method: Credits,
        settings: dict[str, str],
        seconds: dict[str, float],
    ) -> dict[str, Any]:
        """The summary, into `summary.json`; samples.png, quality.png and report.html beside it.

        `settings` are YAML texts by title, `seconds` those of the stages.
        """
        summary, rows = json.loads(self.measurements.read_text()), json.loads(self.speed.read_text())
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
        summary["wall_seconds"] = seconds | {"total": sum(seconds.values())}
        summary["protocol"] = self.protocol() | {
            "Speed": self.speed_protocol(student.device),
            "Features": reference.features.name,
            "Real images": reference.source,
        }

        title = f"Teacher, {best['steps']} steps ({best['nfe']:g} evaluations)"
        samples = self.samples({title: (teacher, best["settings"]), "Student, one evaluation": (student, {})})
        write_picture(self.output / "samples.png", side_by_side(samples))
        write_picture(self.output / "quality.png", quality_plot(summary))
        write_report(
            self.output / "report.html",
            method=method,
            summary=summary,
            speed=rows,
            samples=samples,
            settings=settings,
            protocol=summary["protocol"],
        )
        write_json(self.output / "summary.json", summary)
        return summary

    def samples(self, candidates: dict[str, tuple[TokenPipeline, dict[str, Any]]]) -> dict[str, Any]:
        """A picture of each candidate (pipeline, settings), a column for each class."""
        pictures = {}
        for name, (pipeline, settings) in candidates.items():
            conditions = all_classes(pipeline)
            pictures[name] = image_grid(_images(pipeline, 8 * len(conditions), conditions, settings), len(conditions))
        return pictures

    def protocol(self) -> dict[str, str]:
        """What the figures are."""
        grid = self.grid
        return {
            "Quality": f"{grid.num_report_images} images for every row, against the real ones. Temperature "
            f"{grid.temperatures} and, for the teacher, guidance {grid.guidance_scales} chosen at each step count by "
            f"FD on another draw of {grid.num_tuning_images} images; the student's temperature on one of "
            f"{grid.num_report_images}, from those whose {self.faithfulness.replace('_', ' ')} is not below that of "
            f"the teacher's best setting{f' by more than {self.allowance}' if self.allowance else ''}, unless none is.",
            "Seed": str(self.seed),
        }

    def speed_protocol(self, device: torch.device) -> str:
        """How images per second were counted, on the device that the pipelines are on."""
        about = machine(device)
        return (
            f"median of 7 interleaved rounds, images decoded, {about['threads']} threads, torch {about['torch']}, "
            f"{about['device'] if device.type == 'cuda' else 'CPU'}; images per second at batch {self.timed_batch}."
        )

    def _grid_as_json(self) -> Any:
        return json.loads(json.dumps(asdict(self.grid)))


class CaptionComparison(Comparison):
    """Of a teacher of captions and its student, on the captions of the test split, by a CLIP that scores."""

    faithfulness, allowance = "clip_score", 0.02
    timed_batch = 32

    def __init__(self, output: Path, data: DataConfig, grid: Grid, seed: int, scoring_clip: Path):
        super().__init__(output, data, grid, seed)
        self.scoring_clip = scoring_clip
        self.captions = PromptConfig(data.name, "test", data.text_column)

    def reference(self, pipeline: TokenPipeline) -> Reference:
        captions = load_prompts(self.captions)
        check_num_samples(MIN_SAMPLES, test_images=len(captions))
        features = ClipFeatures.load(self.scoring_clip, captions, pipeline.device)
        return make_reference(features, like(pipeline, self.data))

    def test_images(self, pipeline: TokenPipeline) -> ImageData:
        """Of the test split, as the pipeline makes its own."""
        return load_data(replace(like(pipeline, self.data), split="test"))

    def conditions(self, pipeline: TokenPipeline) -> Conditions:
        return Prompts(pipeline, load_prompts(self.captions))

    def prompts(self) -> list[str] | None:
        return load_prompts(self.captions)[:10]

    def summarise(
        self,
        teacher: MaskedDiffusionPipeline,
        student: OneStepPipeline,
        reference: Reference,
        **about: Any,
    ) -> dict[str, Any]:
        """Beside the rest, what the real images of the test split measure."""
        found = embed(reference.features, self.test_images(teacher))["features"]
        real = reference.measure(found, torch.arange(len(found))) | {"nfe": 0, "settings": {}}
        measured = json.loads(self.measurements.read_text())
        write_json(self.measurements, measured | {"real_test_images": real})
        return super().summarise(teacher, student, reference, **about)

    def samples(self, candidates: dict[str, tuple[TokenPipeline, dict[str, Any]]]) -> dict[str, Any]:
        """The first prompts of the test split, their own images, and four of each candidate."""
        prompts, num_images = load_prompts(self.captions)[:12], 4
        teacher, _ = next(iter(candidates.values()))
        first = self.test_images(teacher).subset(list(range(len(prompts))))
        pictures = {"Test image": image_grid(first.images(), 1)}
        for name, (pipeline, settings) in candidates.items():
            repeated = [prompt for prompt in prompts for _ in range(num_images)]
            images = _images(pipeline, len(repeated), Prompts(pipeline, repeated), settings)
            pictures[name] = image_grid(images, num_images)
        texts = text_column(prompts, pictures["Test image"].height // len(prompts))
        return {"Prompts of the test split": side_by_side({"": texts, **pictures})}


def untrained(teacher: MaskedDiffusionPipeline, student: OneStepPipeline) -> OneStepPipeline:
    """The student before distillation: the teacher in one evaluation of the student's initial tokens."""
    return OneStepPipeline(
        teacher.denoiser, teacher.tokenizer, student.initialiser, teacher.text_encoder, teacher.text_tokenizer
    )


def _images(pipeline: TokenPipeline, num_images: int, conditions: Conditions, settings: dict[str, Any]) -> torch.Tensor:
    """Images for a picture, (N, C, H, W)."""
    batches = generate(pipeline, torch.arange(num_images), conditions=conditions, **settings)
    return torch.cat([batch.images.cpu() for batch in batches])
