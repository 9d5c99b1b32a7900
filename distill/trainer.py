"""The training loop, for teachers and for distillation.

It knows devices, processes, optimizers, averaged weights, checkpoints and logs; the method that it runs knows none.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from distill.checkpoint import newest_checkpoint, save_checkpoint
from distill.config import setting
from teachers.progress import progress_bar
from teachers.randomness import derive_seed, sample_generators

logger = logging.getLogger(__name__)

LEARNING_RATE_SCHEDULES = ("constant_with_warmup", "linear", "cosine")
MIXED_PRECISIONS = ("no", "bf16")
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
    mixed_precision: str = setting("no", "no or bf16")
    gradient_checkpointing: bool = setting(False, "compute activations again in the backward: less memory, more time")
    seed: int = setting(0, "every random draw is a function of it, the step and the place in the batch")
    log_every: int = setting(20, "steps between lines of metrics.jsonl")
    evaluate_every: int = setting(0, "steps between sample grids and quick measurements; 0: only at the end")
    checkpoint_every: int = setting(500, "steps between checkpoints; one is always written at the end")
    keep_checkpoints: int = setting(2, "how many of the newest checkpoints are kept")
    max_nonfinite_steps: int = setting(10, "the run ends after this many steps in a row without finite gradients")
    tracker: str = setting("tensorboard", "tensorboard, wandb or none; metrics.jsonl is written always")
    resume: bool = setting(False, "go on from the newest whole checkpoint in the output folder")

    def __post_init__(self) -> None:
        for name in (
            "num_steps",
            "batch_size",
            "gradient_accumulation_steps",
            "log_every",
            "checkpoint_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name}={getattr(self, name)} must be at least 1")
        for name in ("keep_checkpoints", "max_nonfinite_steps"):
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


class Method(Protocol):
    """What is trained: each step is a sequence of updates, an update names the networks that learn in it."""

    @property
    def updates(self) -> tuple[tuple[str, ...], ...]: ...

    def losses(
        self,
        networks: dict[str, nn.Module],
        update: tuple[str, ...],
        batch: Any,
        generator: list[torch.Generator],
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]: ...


def make_accelerator(config: TrainingConfig, output: Path) -> Accelerator:
    """The Accelerator of a run whose trackers write into `output`."""
    if config.tracker == "wandb" and find_spec("wandb") is None:
        raise ValueError("training.tracker=wandb needs the package: pip install 'one-step-mdm[wandb]', or wandb")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=str(output),
    )
    if accelerator.distributed_type.value == "DEEPSPEED":
        raise ValueError("DeepSpeed trains one model per run, and distillation trains two; use DDP (--multi_gpu)")
    share = config.batch_size / (accelerator.num_processes * config.gradient_accumulation_steps)
    if not share.is_integer():
        raise ValueError(
            f"training.batch_size={config.batch_size} does not divide over {accelerator.num_processes} processes "
            f"and {config.gradient_accumulation_steps} accumulation steps"
        )
    return accelerator


def claim_output(output: Path, resume: bool) -> None:
    """Make the output folder of a new run, or see that there is a run to resume; nothing is ever overwritten."""
    if resume:
        newest_checkpoint(output / "checkpoints")
    elif output.exists() and any(output.iterdir()):
        raise ValueError(
            f"the output folder {output} is not empty; name another one, remove it, or go on with training.resume=true"
        )
    else:
        output.mkdir(parents=True, exist_ok=True)


class Trainer:
    """Trains networks by a method.

    Args:
        networks: the networks that learn, by name; each gets an optimizer of its own.
        learning_rates: of each network.
        averaged: the network whose averaged weights are evaluated and saved, under `averaged/` in each checkpoint.
        draw_batch: (step, places in the global batch, a generator for each place) -> what the method takes as batch.
        evaluate: (averaged network, step) -> metrics; called on the main process.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        method: Method,
        networks: dict[str, ModelMixin],
        learning_rates: dict[str, float],
        averaged: str,
        draw_batch: Callable[[int, range, list[torch.Generator]], Any],
        output: Path,
        evaluate: Callable[[ModelMixin, int], dict[str, float]] | None = None,
        run_settings: dict[str, Any] | None = None,
    ):
        self.config, self.accelerator, self.method = config, accelerator, method
        self.draw_batch, self.output, self.evaluate = draw_batch, output, evaluate
        self.step = 0
        self._nonfinite_in_a_row = 0
        self._stop_requested = False

        self._averaged_name = averaged
        self._averaged_network = copy.deepcopy(networks[averaged]).to(accelerator.device).eval().requires_grad_(False)
        self.networks: dict[str, nn.Module] = {}
        self.optimizers, self.schedulers = {}, {}
        for name, network in networks.items():
            optimizer = torch.optim.AdamW(
                [parameter for parameter in network.parameters() if parameter.requires_grad],
                lr=learning_rates[name],
                betas=(0.9, config.adam_beta2),
                eps=config.adam_epsilon,
                weight_decay=config.weight_decay,
            )
            self.networks[name], self.optimizers[name] = accelerator.prepare(network, optimizer)
            self.schedulers[name] = get_scheduler(
                config.learning_rate_schedule,
                optimizer,
                num_warmup_steps=config.warmup_steps,
                num_training_steps=config.num_steps,
            )
        self.ema = EMAModel(self._unwrapped(averaged).parameters(), decay=config.ema_decay, foreach=True)
        accelerator.register_for_checkpointing(self, self.ema, *self.schedulers.values())

        if config.resume:
            checkpoint = newest_checkpoint(output / "checkpoints")
            accelerator.load_state(str(checkpoint))
            self.ema.to(accelerator.device)
            logger.info("resuming from %s", checkpoint)
        if accelerator.is_main_process:
            self._trim_metrics()
        plain = {  # tensorboard takes nothing else
            key: value if isinstance(value, int | float | str) else str(value)
            for key, value in (run_settings or {}).items()
        }
        accelerator.init_trackers("tracker", config=plain)

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def train(self) -> bool:
        """Run to the last step; False if a signal ended it early. Either way a checkpoint holds all that was done."""
        config = self.config
        progress = progress_bar(
            total=config.num_steps,
            initial=self.step,
            desc=self.output.name,
            unit="step",
            disable=not self.accelerator.is_main_process,
        )
        with progress, self._stop_on_signals():
            if self.step == 0 and config.evaluate_every:
                self._evaluate()  # the start to compare with; and what cannot be measured should fail now
            while self.step < config.num_steps:
                metrics: dict[str, torch.Tensor] = {}
                for number, update in enumerate(self.method.updates):
                    metrics |= self._update(number, update)
                for scheduler in self.schedulers.values():
                    scheduler.step()
                self.ema.step(self._unwrapped(self._averaged_name).parameters())
                self.step += 1

                last = self.step == config.num_steps
                if last or self.step % config.log_every == 0:
                    progress.set_postfix(self._log(metrics), refresh=False)
                progress.update()
                stop = self._stop_is_requested() or 0 < config.max_steps <= self.step
                if last or stop or self.step % config.checkpoint_every == 0:
                    self._save()
                if last or (config.evaluate_every and self.step % config.evaluate_every == 0):
                    self._evaluate()
                if stop and not last:
                    logger.warning("stopped after step %d; go on with training.resume=true", self.step)
                    break
        self.accelerator.end_training()
        return self.step == config.num_steps

    def averaged_network(self) -> ModelMixin:
        """A copy of the averaged network with the averaged weights."""
        self.ema.copy_to(self._averaged_network.parameters())
        return self._averaged_network

    def _update(self, number: int, update: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """One optimizer step of the networks named in `update`, unless a loss or gradient is not finite."""
        config, accelerator = self.config, self.accelerator
        torch.manual_seed(derive_seed(config.seed, self.step, number, accelerator.process_index))  # for dropout
        num_parts = config.gradient_accumulation_steps
        share = config.batch_size // (accelerator.num_processes * num_parts)
        all_metrics = []
        finite = torch.ones((), device=accelerator.device)
        for part in range(num_parts):
            first = (part * accelerator.num_processes + accelerator.process_index) * share
            places = range(first, first + share)
            generator = sample_generators(config.seed, self.step, number, places=places)
            batch = self.draw_batch(self.step, places, generator)
            with contextlib.ExitStack() as stack:
                if part < num_parts - 1:
                    for name in update:
                        stack.enter_context(accelerator.no_sync(self.networks[name]))
                with accelerator.autocast():
                    losses, metrics = self.method.losses(self.networks, update, batch, generator)
                loss = torch.stack(list(losses.values())).sum() / num_parts
                accelerator.backward(loss)
            finite = finite * loss.detach().isfinite()
            all_metrics.append(metrics)

        metrics = {key: torch.stack([part[key] for part in all_metrics]).mean() for key in all_metrics[0]}
        for name in update:
            norm = accelerator.clip_grad_norm_(self.networks[name].parameters(), config.max_grad_norm)
            metrics[f"{name}_grad_norm"] = norm
            finite = finite * norm.isfinite()

        # All processes have to agree before any of them lets its optimizer see the gradients.
        if accelerator.gather(finite[None]).min() > 0:
            self._nonfinite_in_a_row = 0
            for name in update:
                self.optimizers[name].step()
        else:
            self._nonfinite_in_a_row += 1
            logger.warning("step %d: a loss or gradient of %s is not finite; skipped", self.step, "/".join(update))
            if self._nonfinite_in_a_row >= config.max_nonfinite_steps:
                raise FloatingPointError(
                    f"{self._nonfinite_in_a_row} updates in a row had no finite loss and gradients (step {self.step}); "
                    "lower the learning rates, or go on from an earlier checkpoint"
                )
        for name in update:
            self.optimizers[name].zero_grad()
        return metrics

    def _log(self, metrics: dict[str, torch.Tensor]) -> dict[str, float]:
        """Average the metrics over processes and write them down."""
        accelerator = self.accelerator
        stacked = torch.stack([value.detach().float() for value in metrics.values()])
        means = accelerator.gather(stacked[None]).mean(0).tolist()
        values = dict(zip(metrics, means, strict=True))
        values["learning_rate"] = next(iter(self.schedulers.values())).get_last_lr()[0]
        self._write(values)
        return {
            key: float(f"{value:.3g}") for key, value in values.items() if "_rate" not in key and "_norm" not in key
        }

    def _evaluate(self) -> None:
        if self.evaluate is not None and self.accelerator.is_main_process:
            measures = self.evaluate(self.averaged_network(), self.step)
            if measures:
                self._write(measures)
        self.accelerator.wait_for_everyone()

    def _write(self, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=self.step)
        if self.accelerator.is_main_process:
            with (self.output / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")

    def _trim_metrics(self) -> None:
        """Forget what was written after the checkpoint that the run goes on from."""
        path = self.output / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= self.step]
            path.write_text("".join(line + "\n" for line in kept))

    def _save(self) -> None:
        def write(folder: Path) -> None:
            self.averaged_network().save_pretrained(folder / "averaged")

        save_checkpoint(self.accelerator, self.output / "checkpoints", self.step, self.config.keep_checkpoints, write)

    def _unwrapped(self, name: str) -> nn.Module:
        return self.accelerator.unwrap_model(self.networks[name])

    @contextlib.contextmanager
    def _stop_on_signals(self):
        """SIGINT and SIGTERM ask for a checkpoint at the end of the step; a second SIGINT stops at once."""

        def request(number, frame):
            self._stop_requested = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop_is_requested(self) -> bool:
        """Whether any process was asked to stop, so that all of them leave together."""
        if self._stop_requested:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()
