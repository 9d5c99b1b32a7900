"""A recipe: what a folder of configurations trains, from images to a one-step student, each stage a launch."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from distill.config import load_config
from distill.jobs.stages import Stages, call, launch
from distill.jobs.student import load_student
from distill.jobs.teacher import TeacherJob
from teachers.data import DataConfig


@dataclass
class Recipe:
    """The stages of a folder of configurations: tokenizer and tokens if it has a tokenizer.yaml, two CLIPs if it has a
    clip.yaml (one for the prompts, another one that scores), teacher, student.

    Args:
        configs, scripts: the folder, and that of the scripts which it launches.
        output: what is there already is not made again.
        seed: of every training.
        data, image_column: in place of the configured ones; empty: those.
        teacher: a pipeline folder to distil in place of one that is trained.
        student_settings: `key=value` of the student's job.
    """

    configs: Path
    scripts: Path
    output: Path
    seed: int = 0
    data: str = ""
    image_column: str = ""
    teacher: Path | None = None
    student_settings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stages = Stages(self.output)
        self.tokens = self.output / "tokens" if (self.configs / "tokenizer.yaml").exists() else None
        self.captioned = (self.configs / "clip.yaml").exists()
        self.scoring_clip = self.output / "scoring-clip" / "clip"
        self.teacher_folder = self.teacher or self.output / "teacher" / "pipeline"
        self.student_run = self.output / "student"
        configured = load_config(TeacherJob, self.configs / "teacher.yaml").data
        self.images: DataConfig = replace(
            configured, name=self.data or configured.name, image_column=self.image_column or configured.image_column
        )

    def train(self) -> None:
        """All of it; an interrupted stage is a ValueError, and goes on when this is called again."""
        stage = self.stages.run
        if self.tokens and not self.teacher_folder.exists():
            stage("tokenizer", self.output / "tokenizer" / "tokenizer", self.train_tokenizer)
            stage("tokens", self.tokens / "index.json", self.cache_tokens)
        if self.captioned:
            stage("clip", self.output / "clip" / "clip", lambda: self.train_clip("clip", self.seed))
            stage("scoring clip", self.scoring_clip, lambda: self.train_clip("scoring-clip", self.seed + 1000))
        stage("teacher", self.teacher_folder, self.train_teacher)
        stage("distillation", self.student_run / "finished", self.train_student)

    def train_tokenizer(self) -> None:
        output = self.output / "tokenizer"
        self._launch("train_tokenizer.py", "tokenizer.yaml", output, self.seed, *self._images("data."))
        _expect(output / "tokenizer", "the tokenizer's training")

    def cache_tokens(self) -> None:
        tokenizer = self.output / "tokenizer" / "tokenizer"
        command = [sys.executable, str(self.scripts / "cache_tokens.py"), "--tokenizer", str(tokenizer)]
        call([*command, "--output", str(self.tokens), *self._images()])

    def train_clip(self, name: str, seed: int) -> None:
        monitor = f"monitor.name={self.images.name}"
        self._launch("train_clip.py", "clip.yaml", self.output / name, seed, *self._images("data."), monitor)
        _expect(self.output / name / "clip", "the CLIP's training")

    def train_teacher(self) -> None:
        settings = self._images("data.")
        if self.tokens:
            settings.append(f"tokens={self.tokens}")
        if self.captioned:
            settings += [f"text_encoder={self.output / 'clip' / 'clip'}", f"scoring_clip={self.scoring_clip}"]
        self._launch("train_teacher.py", "teacher.yaml", self.output / "teacher", self.seed, *settings)
        _expect(self.teacher_folder, "the teacher's training")

    def train_student(self) -> None:
        settings = [f"teacher={self.teacher_folder}", *self._images("monitor.")]
        if self.captioned:
            settings += [f"prompts.name={self.images.name}", f"prompts.column={self.images.text_column}"]
            settings.append(f"scoring_clip={self.scoring_clip}")
        settings += self.student_settings
        self._launch("train_student.py", "student.yaml", self.student_run, self.seed, *settings)
        _, job, step = load_student(self.student_run)
        if step == job.training.num_steps:
            (self.student_run / "finished").touch()
        _expect(self.student_run / "finished", "the distillation")

    def _launch(self, script: str, config: str, output: Path, seed: int, *settings: str) -> None:
        launch(self.scripts / script, self.configs / config, output, f"training.seed={seed}", *settings)

    def _images(self, prefix: str = "") -> list[str]:
        return [f"{prefix}{key}={value}" for key, value in asdict(self.images).items()]


def _expect(result: Path, what: str) -> None:
    if not result.exists():
        raise ValueError(f"{what} was interrupted; run the same command again to go on")
