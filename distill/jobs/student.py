"""The job that distils a teacher into a one-step student, by the method of its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from distill.config import choice, load_config, section, setting
from distill.jobs.run import CONFIG, note_saved, note_settings, open_run
from distill.jobs.sources import SOURCES, check_sources, locate, note_sources, sources_of
from distill.loop.alarms import AlarmConfig
from distill.loop.checkpoint import best_checkpoint, has_checkpoints, newest_checkpoint, step_of, verify_checkpoint
from distill.loop.config import TrainingConfig
from distill.loop.host import by_main_process
from distill.loop.state import SavedTensors, restore, trained_parameters
from distill.loop.trainer import AVERAGED, CHECKPOINTS, Trainer
from distill.methods import METHODS
from students.adapters import make_learner, merged
from students.initialisation import NOISE_SCALES, RANDOM_TOKENS, TokenInitialiser
from students.pipeline import OneStepPipeline
from teachers.conditions.condition import Condition, Conditions
from teachers.conditions.prompt_cache import PromptCache, prompts_key, write_prompt_cache
from teachers.conditions.prompts import PromptConfig, load_prompts
from teachers.cost import cost_summary
from teachers.data import DataConfig
from teachers.denoiser import Denoiser
from teachers.folder import new_file, new_folder
from teachers.networks.recompute import recompute_activations
from teachers.pipeline import MaskedDiffusionPipeline, all_classes
from teachers.randomness import derive_seed, rand
from teachers.sharing import each_once

PROMPTS, INITIALISER = "prompts.txt", "initialiser"  # in the folder of a run; the first is the key of its prompts
TEACHER_DTYPES: dict[str, Callable[[Any], nn.Module]] = {
    "float32": nn.Module.float,
    "bfloat16": nn.Module.bfloat16,
    "float16": nn.Module.half,
}


@dataclass
class InitialConfig:
    """What the student starts from."""

    mask_ratio: tuple[float, float] = setting((0.6, 0.6), "lowest and highest share of masks, drawn for each sample")
    random_tokens: str = setting("marginal", "the other tokens: uniform (the paper), or the teacher's marginal")
    embedding_noise: float = setting(0.0, "sigma of sqrt(1 - s^2) e + s n on the token embeddings")
    noise_scale: str = setting("embedding", "size of n: embedding (their RMS), or unit (the paper)")
    known_tokens: float = setting(0.0, "probability that a part of a sample is known: a student that completes images")

    def __post_init__(self) -> None:
        lowest, highest = self.mask_ratio
        if not 0 <= lowest <= highest <= 1:
            raise ValueError(f"initial.mask_ratio={[lowest, highest]} must be ordered and within [0, 1]")
        for name in ("embedding_noise", "known_tokens"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"initial.{name}={getattr(self, name)} must be in [0, 1]")
        for name, known in [("random_tokens", RANDOM_TOKENS), ("noise_scale", NOISE_SCALES)]:
            if getattr(self, name) not in known:
                raise ValueError(f"initial.{name}={getattr(self, name)!r}; choose from {', '.join(known)}")


@dataclass
class StudentJob:
    """Distil a teacher into a one-step student."""

    teacher: str = setting("runs/teacher/pipeline", "folder or hub id of a MaskedDiffusionPipeline")
    teacher_dtype: str = setting("float32", "of the frozen teacher's weights: float32, bfloat16 or float16")
    output: str = setting("runs/student", "folder of the run; scripts/export.py makes a OneStepPipeline of it")
    adapter_rank: int = setting(0, "learn LoRA adapters of this rank on the teacher's frozen weights; 0: all weights")
    freeze_embeddings: bool = setting(True, "keep the embeddings and the output layer tied to them as the teacher's")
    method: Any = choice(METHODS, "dimo", "how the student learns")
    initial: InitialConfig = section(InitialConfig, "initial tokens")
    training: TrainingConfig = section(lambda: TrainingConfig(learning_rate=2e-4), "the loop")
    alarms: AlarmConfig = section(AlarmConfig, "what tells that it has gone wrong")
    prompts: PromptConfig = section(PromptConfig, "what a teacher conditioned on text is distilled on")
    negative_prompt: str = setting("", "what its guidance leads away from; empty: the teacher's own")
    monitor: DataConfig = section(lambda: DataConfig(name=""), "real images to measure against during training")
    scoring_clip: str = setting("", "CLIP (folder or hub id) that measures samples of prompts during training")

    FORMERLY: ClassVar = {
        "auxiliary_learning_rate": "method.auxiliary_learning_rate",
        "alarms.lowest_token_entropy": "method.lowest_token_entropy",
        "alarms.lowest_unique_tokens": "method.lowest_unique_tokens",
    }

    def __post_init__(self) -> None:
        if self.adapter_rank < 0:
            raise ValueError(f"adapter_rank={self.adapter_rank} must be 0 or more")
        if self.teacher_dtype not in TEACHER_DTYPES:
            raise ValueError(f"teacher_dtype={self.teacher_dtype!r}; choose from {', '.join(TEACHER_DTYPES)}")
        if self.teacher_dtype != "float32" and self.training.mixed_precision == "no":
            raise ValueError(f"teacher_dtype={self.teacher_dtype} needs training.mixed_precision=bf16 or fp16")


Monitor = Callable[[OneStepPipeline, Conditions, int, Callable[[], None]], dict[str, float]]


def load_teacher(name: str) -> MaskedDiffusionPipeline:
    """The teacher of a local folder or hub id; a missing one is a FileNotFoundError."""
    try:
        return MaskedDiffusionPipeline.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"there is no MaskedDiffusionPipeline at {name} (a folder with model_index.json, or a hub id): {error}"
        ) from error


def train_student(job: StudentJob, monitor: Monitor | None = None) -> bool:
    """Run the job; `monitor(pipeline, conditions, step, heartbeat)` measures the averaged student now and then.

    False if interrupted.
    """
    teacher, method_class = load_teacher(job.teacher), METHODS[job.method.name]
    method_class.check(job.method, teacher.denoiser)
    accelerator, output = open_run(job, prepared=(PROMPTS, INITIALISER, SOURCES))
    sources = by_main_process(lambda: checked_sources(job, teacher))
    if job.teacher_dtype != "float32" and accelerator.device.type == "cpu":
        raise ValueError(
            f"teacher_dtype={job.teacher_dtype} is for GPUs: under autocast, a CPU has no layer norm of such weights; "
            "leave it at float32"
        )
    accelerator.print(cost_summary(teacher))

    # The teacher is never prepared: it would be wrapped for gradients and written into every checkpoint.
    teacher.to(accelerator.device)
    teacher.denoiser.eval().requires_grad_(False)
    conditions = open_conditions(job, teacher, output)
    initialiser = make_initialiser(job, teacher, conditions, output)
    torch.manual_seed(derive_seed(job.training.seed, "adapters"))
    learner = partial(learner_of, job, teacher.denoiser)
    method = method_class(job.method, teacher.denoiser, initialiser, learner, compiled=job.training.compile)
    TEACHER_DTYPES[job.teacher_dtype](teacher.denoiser)  # now that learners were made of it, in float32
    if job.training.compile:
        teacher.denoiser.compile_repeated_blocks()

    def pipeline(network: Denoiser) -> OneStepPipeline:
        student = OneStepPipeline(merged(network), teacher.tokenizer, initialiser, class_names=teacher.class_names)
        return student.to(accelerator.device)

    def evaluate(network: Denoiser, step: int, heartbeat: Callable[[], None]) -> dict[str, float]:
        assert monitor is not None
        return monitor(pipeline(network), conditions, step, heartbeat)

    def draw_condition(step: int, places: range, generators: list[torch.Generator]) -> Condition:
        uniform = rand(len(places), 1, generator=generators).squeeze(1)
        rows = (uniform * len(conditions)).long().clamp(max=len(conditions) - 1)  # of millions it may round up
        return conditions.condition(rows, accelerator.device)

    trainer = Trainer(
        job.training,
        accelerator,
        method,
        draw_batch=draw_condition,
        output=output,
        evaluate=evaluate if monitor is not None else None,
        alarms=job.alarms,
        sequence_length=teacher.sequence_length,
        run_settings=asdict(job.method) | {"batch_size": job.training.batch_size},
    )
    note_settings(job)
    by_main_process(lambda: note_sources(output, sources))
    finished = trainer.train()
    note_saved(job)
    accelerator.end_training()
    return finished


def checked_sources(job: StudentJob, teacher: MaskedDiffusionPipeline) -> dict[str, Any]:
    """What the run learns from; a ValueError where that is not what it learnt from before."""
    output, sources = Path(job.output), sources_of(teacher, job.teacher, job.prompts.name)
    if has_checkpoints(output / CHECKPOINTS):
        check_sources(output, sources)
    return sources


def open_conditions(job: StudentJob, teacher: MaskedDiffusionPipeline, output: Path) -> Conditions:
    """All classes, or none, or the prompts: encoded once for all runs, and the text encoder is let go."""
    if teacher.condition_kind != "text":
        return all_classes(teacher)
    if not job.prompts.name:
        raise ValueError("this teacher is conditioned on text: name the prompts to distil on (prompts.name)")
    prompts, negative_prompt = load_prompts(job.prompts), job.negative_prompt or teacher.config.negative_prompt
    parent = Path(job.prompts.cache) if job.prompts.cache else output.parent / "prompts"
    if teacher.text_encoder is None or teacher.text_tokenizer is None:
        raise ValueError(f"the teacher at {job.teacher} has no text encoder and tokenizer, which encode the prompts")
    to_encode = teacher.text_encoder, teacher.text_tokenizer, prompts, negative_prompt
    for note in each_once([output / PROMPTS]):
        with new_file(note) as staging:
            staging.write_text(prompts_key(*to_encode))
    if prompts_key(*to_encode) != (output / PROMPTS).read_text():
        raise ValueError(
            f"{output} was begun on other prompts, or with another text encoder; name another output folder"
        )
    folder = write_prompt_cache(parent, *to_encode)
    teacher.register_modules(text_encoder=None, text_tokenizer=None)
    return PromptCache(folder, teacher.tokenizer.config.image_size)


def make_initialiser(
    job: StudentJob, teacher: MaskedDiffusionPipeline, conditions: Conditions, output: Path
) -> TokenInitialiser:
    """The initialiser in the run's folder, put there first if it is not."""
    folder = output / INITIALISER
    for missing in each_once([folder]):
        with new_folder(missing, shared=True) as staging:
            initialiser = TokenInitialiser.for_teacher(teacher, conditions=conditions, **asdict(job.initial))
            initialiser.save_pretrained(staging)
    return TokenInitialiser.from_pretrained(folder).to(teacher.device)


def learner_of(job: StudentJob, teacher: Denoiser) -> Denoiser:
    """A network that starts as the teacher and learns as the job says."""
    learner = make_learner(teacher, job.freeze_embeddings, job.adapter_rank)
    if job.training.gradient_checkpointing:
        recompute_activations(learner.layers)
    if job.training.compile:
        learner.compile_repeated_blocks()
    return learner


def load_student(run: Path, best: bool = False, teacher_name: str = "") -> tuple[OneStepPipeline, StudentJob, int]:
    """The student with the averaged weights of a run's newest whole checkpoint, or of the best; the job, and the step.

    The teacher is looked for under the name given, or else where the run found it. Raises FileNotFoundError where
    there is none of these, ValueError where the best checkpoint is damaged or the teacher is another one.
    """
    job = load_job(run)
    if best:
        checkpoint = find_best(run)
        verify_checkpoint(checkpoint)
    else:
        checkpoint = newest_checkpoint(run / CHECKPOINTS)
    step = step_of(checkpoint)
    job.teacher = teacher_name or job.teacher
    teacher_name = teacher_name or locate(run, "teacher", job.teacher)
    job.prompts.name = locate(run, "prompts", job.prompts.name)
    try:
        teacher = load_teacher(teacher_name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. If it is elsewhere now, scripts/export.py --teacher says where") from error
    check_sources(run, sources_of(teacher, teacher_name, job.prompts.name))
    learner: Any = make_learner(teacher.denoiser, job.freeze_embeddings, job.adapter_rank)
    if job.adapter_rank:
        TEACHER_DTYPES[job.teacher_dtype](teacher.denoiser)  # what the adapters, which are in float32, learnt beside
    restore(trained_parameters(learner), SavedTensors(checkpoint, AVERAGED))
    student = merged(learner).requires_grad_(False)
    initialiser = TokenInitialiser.from_pretrained(run / INITIALISER)
    parts = student, teacher.tokenizer, initialiser, teacher.text_encoder, teacher.text_tokenizer
    return OneStepPipeline(*parts, class_names=teacher.class_names), job, step


def find_best(run: Path) -> Path:
    """The checkpoint that measured best in a run; FileNotFoundError where nothing was measured."""
    found = best_checkpoint(run / CHECKPOINTS)
    if found is None:
        raise FileNotFoundError(f"no checkpoint of {run} was marked as the best (training.keep_best)")
    return found[0]


def load_job(run: Path) -> StudentJob:
    """The job of a run folder; a folder that is none is a FileNotFoundError."""
    if not (run / CONFIG).is_file():
        raise FileNotFoundError(f"{run} is not the folder of a distillation run: it has no {CONFIG}")
    return load_config(StudentJob, run / CONFIG)
