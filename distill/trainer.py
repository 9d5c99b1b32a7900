"""The training loop, for teachers and for distillation.

It knows devices, processes, optimizers, averaged weights, checkpoints and logs; the method that it runs knows none.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import signal
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from distill.alarms import Alarms
from distill.checkpoint import best_checkpoint, mark_best, newest_checkpoint, save_checkpoint
from distill.launch import refuse_other_launches, shard_on_cpu
from distill.loss_scale import LossScale
from distill.state import adam_state, gather, restore
from distill.training_config import TrainingConfig
from teachers.progress import progress_bar
from teachers.randomness import derive_seed, sample_generators

logger = logging.getLogger(__name__)

STATE = "trainer.json"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


Evaluation = Callable[[Any, int, Callable[[], None]], dict[str, float]]


class Stopped(Exception):
    """Raised in an evaluation when the run was asked to stop."""


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
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The loss of each network named in `update`, and metrics: means, or (2,) the sum and the number of values."""
        ...


def make_accelerator(config: TrainingConfig, output: Path) -> Accelerator:
    """The Accelerator of a run whose trackers write into `output`."""
    if config.tracker == "wandb" and find_spec("wandb") is None:
        raise ValueError("training.tracker=wandb needs the package: pip install 'one-step-mdm[wandb]', or wandb")
    refuse_other_launches()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=str(output),
    )
    shard_on_cpu(accelerator)
    if config.mixed_precision == "fp16":
        accelerator.native_amp = True  # on a CPU it would run in full precision without a word
    share = config.batch_size / (accelerator.num_processes * config.gradient_accumulation_steps)
    if not share.is_integer():
        raise ValueError(
            f"training.batch_size={config.batch_size} does not divide over {accelerator.num_processes} processes "
            f"and {config.gradient_accumulation_steps} accumulation steps"
        )
    shared = "" if accelerator.num_processes == 1 else ", FSDP2" if accelerator.is_fsdp2 else ", DDP"
    accelerator.print(
        f"{accelerator.num_processes} x {accelerator.device.type}{shared}, mixed precision: {config.mixed_precision}"
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


def on_main_process(evaluate: Callable[[Any, int], dict[str, float]]) -> Evaluation:
    """An evaluation by the main process alone, whose measures all get."""

    def broadcast(network: Any, step: int, heartbeat: Callable[[], None]) -> dict[str, float]:
        return broadcast_object_list([evaluate(network, step) if PartialState().is_main_process else None])[0]

    return broadcast


class Trainer:
    """Trains networks by a method.

    Args:
        networks: the networks that learn, by name; each gets an optimizer of its own.
        learning_rates: of each network.
        averaged: the network whose averaged weights are evaluated and saved, under `averaged/` in each checkpoint.
        draw_batch: (step, places in the global batch, a generator for each place) -> what the method takes as batch.
        evaluate: (averaged network, step, heartbeat) -> metrics; called on every process. It calls `heartbeat()` now
            and then, on every process alike: that is where an evaluation can be stopped.
        alarms: what looks at each line of metrics.
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
        evaluate: Evaluation | None = None,
        alarms: Alarms | None = None,
        run_settings: dict[str, Any] | None = None,
    ):
        self.config, self.accelerator, self.method = config, accelerator, method
        self.draw_batch, self.output, self.evaluate, self.alarms = draw_batch, output, evaluate, alarms
        self.checkpoints = output / "checkpoints"
        self.step = 0
        self.loss_scale = LossScale(enabled=accelerator.mixed_precision == "fp16")
        self._nonfinite_in_a_row = 0
        self._stop_requested = False

        self._averaged_name = averaged
        self._averaged_network = copy.deepcopy(networks[averaged]).cpu().eval().requires_grad_(False)
        self.networks: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.schedulers = {}
        for name, network in networks.items():
            optimizer = torch.optim.AdamW(
                [parameter for parameter in network.parameters() if parameter.requires_grad],
                lr=learning_rates[name],
                betas=(0.9, config.adam_beta2),
                eps=config.adam_epsilon,
                weight_decay=config.weight_decay,
            )
            # One network at a time: FSDP2 takes no more. The wrapper of the optimizer is left aside, since it updates
            # the loss scale once for each of several optimizers.
            self.networks[name], wrapper = accelerator.prepare(network, optimizer)
            self.optimizers[name] = wrapper.optimizer
            self.schedulers[name] = get_scheduler(
                config.learning_rate_schedule,
                self.optimizers[name],
                num_warmup_steps=config.warmup_steps,
                num_training_steps=config.num_steps,
            )
        parameters = list(self._unwrapped(averaged).parameters())
        whole = not any(isinstance(parameter, DTensor) for parameter in parameters)  # torch has no foreach for shards
        self.ema = EMAModel(parameters, decay=config.ema_decay, foreach=whole)
        if config.resume:
            self._load()
        if accelerator.is_main_process:
            self._trim_metrics()
        plain = {  # tensorboard takes nothing else
            key: value if isinstance(value, int | float | str) else str(value)
            for key, value in (run_settings or {}).items()
        }
        accelerator.init_trackers("tracker", config=plain)

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
                saved = (last or self.step % config.checkpoint_every == 0) and self._save()
                evaluation_due = last or (config.evaluate_every and self.step % config.evaluate_every == 0)
                best = self._evaluate() if evaluation_due else None
                stop = not last and (self._stop_is_requested() or 0 < config.max_steps <= self.step)
                if not saved and (last or stop or best is not None):
                    saved = self._save()
                if not saved and (last or stop):
                    raise OSError(
                        f"the run ends after step {self.step} without a checkpoint of it; see the warning above"
                    )
                if saved and best is not None:
                    self._mark_best(best)
                if stop:
                    logger.warning("stopped after step %d; go on with training.resume=true", self.step)
                    break
        self.accelerator.end_training()
        return self.step == config.num_steps

    def averaged_network(self) -> ModelMixin:
        """A copy of the averaged network with the averaged weights, on the CPU; all processes call it."""
        whole = gather(self._averages(), keep=True)
        restore(dict(self._averaged_network.named_parameters()), whole)
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
                (loss * self.loss_scale.value).backward()
            finite = finite * loss.detach().isfinite()
            all_metrics.append(metrics)

        metrics = {
            key: torch.stack([_sum_and_number(part[key]) for part in all_metrics]).sum(0) for key in all_metrics[0]
        }
        for name in update:
            norm = self._clip_gradients(name)
            metrics[f"{name}_grad_norm"] = _sum_and_number(norm)
            finite = finite * norm.isfinite()

        # All processes have to agree before any of them lets its optimizer see the gradients.
        all_finite = bool(accelerator.gather(finite[None]).min() > 0)
        if all_finite:
            for name in update:
                self.optimizers[name].step()
        self._count_nonfinite(all_finite, update)
        for name in update:
            self.optimizers[name].zero_grad()
        return metrics

    def _clip_gradients(self, name: str) -> torch.Tensor:
        """Undo the loss scale, clip, and return the norm before that."""
        parameters = [parameter for parameter in self.networks[name].parameters() if parameter.grad is not None]
        if self.loss_scale.value != 1:
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.div_(self.loss_scale.value)
        norm = nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _count_nonfinite(self, finite: bool, update: tuple[str, ...]) -> None:
        scaled_down = self.loss_scale.update(finite)
        if finite:
            self._nonfinite_in_a_row = 0
        elif not scaled_down:  # otherwise it is how the loss scale finds its size
            self._nonfinite_in_a_row += 1
            logger.warning("step %d: a loss or gradient of %s is not finite; skipped", self.step, "/".join(update))
        if self._nonfinite_in_a_row >= self.config.max_nonfinite_steps:
            raise FloatingPointError(
                f"{self._nonfinite_in_a_row} updates in a row had no finite loss and gradients (step {self.step}); "
                "lower the learning rates, or go on from an earlier checkpoint"
            )

    def _log(self, metrics: dict[str, torch.Tensor]) -> dict[str, float]:
        """Average the metrics over processes and write them down."""
        accelerator = self.accelerator
        sums, numbers = accelerator.gather(torch.stack(list(metrics.values()))[None]).sum(0).unbind(-1)
        values = dict(zip(metrics, (sums / numbers).tolist(), strict=True))
        values["learning_rate"] = next(iter(self.schedulers.values())).get_last_lr()[0]
        self._write(values)
        if self.alarms is not None:
            for message in self.alarms(values):
                logger.warning("step %d: %s", self.step, message)
                self._stop_requested |= self.alarms.config.stop
        return {
            key: float(f"{value:.3g}") for key, value in values.items() if "_rate" not in key and "_norm" not in key
        }

    def _evaluate(self) -> float | None:
        """Measure and write down; the measure that the best checkpoint is chosen by, if it is lower than any before."""
        if self.evaluate is None:
            return None
        try:
            measures = self.evaluate(self.averaged_network(), self.step, self._heartbeat)
        except Stopped:
            logger.warning("the evaluation of step %d was left, to stop", self.step)
            return None
        finally:
            self._averaged_network.cpu()
        if measures:
            self._write(measures)
        value, best = measures.get(self.config.keep_best), best_checkpoint(self.checkpoints)
        return value if value is not None and (best is None or value < best[2]) else None

    def _heartbeat(self) -> None:
        if self._stop_is_requested():
            raise Stopped

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

    def _save(self) -> bool:
        return save_checkpoint(
            self.accelerator, self.checkpoints, self.step, self.config.keep_checkpoints, self._contents()
        )

    def _contents(self) -> Iterator[Callable[[Path], object]]:
        """What a checkpoint holds, part by part: all processes gather, and the main one may write."""
        keep = self.accelerator.is_main_process
        for name in self.networks:
            network = self._unwrapped(name)
            weights = gather(network.state_dict(), keep)
            yield partial(_save_tensors, weights, f"{name}.safetensors")
            moments = gather(adam_state(network, self.optimizers[name]), keep)
            yield partial(_save_tensors, moments, f"{name}.adam.safetensors")
        averaged = self.averaged_network()
        yield lambda folder: averaged.save_pretrained(folder / "averaged")
        counters = {
            "step": self.step,
            "averaged_steps": self.ema.optimization_step,
            "loss_scale": self.loss_scale.state_dict(),
            "schedulers": {name: scheduler.state_dict() for name, scheduler in self.schedulers.items()},
        }
        yield lambda folder: (folder / STATE).write_text(json.dumps(counters))

    def _load(self) -> None:
        """Go on from the newest whole checkpoint, which the main process finds."""
        found = [str(newest_checkpoint(self.checkpoints)) if self.accelerator.is_main_process else None]
        checkpoint = Path(broadcast_object_list(found)[0])
        for name in self.networks:
            network = self._unwrapped(name)
            restore(network.state_dict(), load_file(checkpoint / f"{name}.safetensors"))
            moments = adam_state(network, self.optimizers[name])
            restore(moments, load_file(checkpoint / f"{name}.adam.safetensors"))
        averaged = type(self._averaged_network).from_pretrained(checkpoint / "averaged")
        restore(self._averages(), dict(averaged.named_parameters()))
        counters = json.loads((checkpoint / STATE).read_text())
        self.step, self.ema.optimization_step = counters["step"], counters["averaged_steps"]
        self.loss_scale.load_state_dict(counters["loss_scale"])
        for name, scheduler in self.schedulers.items():
            scheduler.load_state_dict(counters["schedulers"][name])
            for group, rate in zip(self.optimizers[name].param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
        logger.info("resuming from %s", checkpoint)

    def _mark_best(self, value: float) -> None:
        if self.accelerator.is_main_process:
            mark_best(self.checkpoints, self.step, self.config.keep_best, value, self.config.keep_checkpoints)

    def _averages(self) -> dict[str, torch.Tensor]:
        names = [name for name, _ in self._unwrapped(self._averaged_name).named_parameters()]
        return dict(zip(names, self.ema.shadow_params, strict=True))

    def _unwrapped(self, name: str) -> nn.Module:
        return self.accelerator.unwrap_model(self.networks[name])

    @contextlib.contextmanager
    def _stop_on_signals(self):
        """The stop signals ask for a checkpoint at the end of the step; a second SIGINT stops at once."""

        def request(number, frame):
            self._stop_requested = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        previous = {number: signal.signal(number, request) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop_is_requested(self) -> bool:
        """Whether any process was asked to stop, so that all of them leave together."""
        if self._stop_requested:
            self.accelerator.set_trigger()
        self._stop_requested = self.accelerator.check_trigger()
        return self._stop_requested


def _save_tensors(tensors: dict[str, torch.Tensor], name: str, folder: Path) -> None:
    save_file(tensors, folder / name)


def _sum_and_number(metric: torch.Tensor) -> torch.Tensor:
    metric = metric.detach().float()
    return metric if metric.ndim else torch.stack([metric, torch.ones_like(metric)])
