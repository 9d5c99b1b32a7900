"""The settings of the training loop."""

from __future__ import annotations

from dataclasses import dataclass

from distill.config import setting

LEARNING_RATE_SCHEDULES = ("constant_with_warmup", "linear", "cosine")
MIXED_PRECISIONS = ("no", "bf16", "fp16")
TRACKERS = ("tensorboard", "wandb", "none")


@dataclass
class TrainingConfig:
    """The settings of the loop."""

    num_steps: int = setting(1000, "training steps")
    max_steps: int = setting(0, "end after so many, with a checkpoint to go on from; 0: run to num_steps")
    batch_size: int = setting(128, "samples per step, over all processes and accumulation steps")
    gradient_accumulation_steps: int = setting(1, "parts that each process splits its share of the batch into")
    learning_rate: float = setting(1e-3, "of the network that is trained: the teacher, or the student")
    learning_rate_schedule: str = setting("constant_with_warmup", "constant_with_warmup, linear or cosine (to zero)")
    warmup_steps: int = setting(100, "steps over which the learning rate rises from zero")
    weight_decay: float = setting(0.0, "AdamW's weight decay; 0 is Adam")
    adam_beta2: float = setting(0.999, "Adam's decay of squared gradients")
    adam_epsilon: float = setting(1e-6, "Adam's epsilon; a smaller one makes full steps of gradients that are rounding")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm, each network's alone")
    ema_decay: float = setting(0.999, "of the averaged weights, warmed up as min(decay, (1 + n) / (10 + n))")
    mixed_precision: str = setting("no", "no, bf16 or fp16")
    gradient_checkpointing: bool = setting(False, "compute activations again in the backward: less memory, more time")
    compile: bool = setting(False, "torch.compile the transformer's blocks: a minute or more first, faster then")
    seed: int = setting(0, "every random draw is a function of it, the step and the place in the batch")
    log_every: int = setting(20, "steps between lines of metrics.jsonl")
    evaluate_every: int = setting(0, "steps between sample grids and quick measurements; 0: only at the end")
    checkpoint_every: int = setting(500, "steps between checkpoints; one is always written at the end")
    keep_checkpoints: int = setting(2, "how many of the newest checkpoints are kept")
    keep_best: str = setting("fd", "and the one where this measure was lowest; empty: none")
    max_nonfinite_steps: int = setting(10, "the run ends after this many steps in a row without finite gradients")
    tracker: str = setting("tensorboard", "tensorboard, wandb or none; metrics.jsonl is written always")
    resume: bool = setting(
        False, "go on from the newest whole checkpoint in the output folder, or start if there is none"
    )

    def __post_init__(self) -> None:
        for name in (
            "num_steps",
            "batch_size",
            "gradient_accumulation_steps",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
            "max_nonfinite_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name}={getattr(self, name)} must be at least 1")
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"training.{name}={getattr(self, name)} must be more than 0")
        for name in ("max_steps", "warmup_steps", "weight_decay", "evaluate_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"training.{name}={getattr(self, name)} must be 0 or more")
        for name in ("ema_decay", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"training.{name}={getattr(self, name)} must be in [0, 1)")
        for name, known in [
            ("learning_rate_schedule", LEARNING_RATE_SCHEDULES),
            ("mixed_precision", MIXED_PRECISIONS),
            ("tracker", TRACKERS),
        ]:
            if getattr(self, name) not in known:
                raise ValueError(f"training.{name}={getattr(self, name)!r}; choose from {', '.join(known)}")
