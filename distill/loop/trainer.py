"""The training loop, for teachers and for distillation.

It knows devices, processes, optimizers, averaged weights, checkpoints and logs; the task that it runs knows none.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor

from distill.loop.alarms import AlarmConfig, Alarms
from distill.loop.checkpoint import best_checkpoint, has_checkpoints, mark_best, newest_checkpoint, save_checkpoint
from distill.loop.config import TrainingConfig
from distill.loop.host import by_main_process, from_main_process, on_any_process, together
from distill.loop.lines import append_line, trim_lines
from distill.loop.loss_scale import LossScale
from distill.loop.optimizers import make_optimizer, make_schedule
from distill.loop.signals import Hopeless, Stopped, StopRequest
from distill.loop.state import (
    SavedTensors,
    adam_state,
    gather,
    kept_by,
    local_parts,
    reshard,
    restore,
    save_share,
    shards_like,
    trained_parameters,
    trained_state,
)
from distill.loop.task import Task
from distill.loop.throughput import Throughput
from teachers.progress import progress_bar
from teachers.randomness import derive_seed, sample_generators

logger = logging.getLogger(__name__)

STATE, AVERAGED = "trainer.json", "averaged"
CHECKPOINTS, TRACKER = "checkpoints", "tracker"  # folders
METRICS, SPEED = "metrics.jsonl", "speed.jsonl"  # the first is a function of the seed, the second of the machine

Evaluation = Callable[[Any, int, Callable[[], None]], dict[str, float]]


def on_main_process(evaluate: Callable[[Any, int], dict[str, float]]) -> Evaluation:
    """An evaluation by the main process alone, whose measures all get."""

    def broadcast(network: Any, step: int, heartbeat: Callable[[], None]) -> dict[str, float]:
        return from_main_process(evaluate(network, step) if PartialState().is_main_process else None)

    return broadcast


class Trainer:
    """Trains the networks of a task.

    Each has an optimizer of its own. The averaged weights of the one that the task names are evaluated and saved, as
    `averaged` in each checkpoint.

    Args:
        draw_batch: (step, places in the global batch, a generator for each place) -> what the task takes as batch.
        evaluate: (averaged network, step, heartbeat) -> metrics; called on every process. It calls `heartbeat()` now
            and then, on every process alike: that is where an evaluation can be stopped. One that fails is a warning,
            but at step 0.
        alarms: what becomes of the task's alarms.
        sequence_length: tokens of a sample, to count their rate; 0 where there are none.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        task: Task,
        draw_batch: Callable[[int, range, list[torch.Generator]], Any],
        output: Path,
        evaluate: Evaluation | None = None,
        alarms: AlarmConfig | None = None,
        sequence_length: int = 0,
        run_settings: dict[str, Any] | None = None,
    ):
        self.config, self.accelerator, self.task = config, accelerator, task
        self.draw_batch, self.output, self.evaluate = draw_batch, output, evaluate
        self.alarms = Alarms(alarms or AlarmConfig(), task.alarms)
        self.checkpoints = output / CHECKPOINTS
        self.step = 0
        self.loss_scale = LossScale(enabled=accelerator.mixed_precision == "fp16")
        self._nonfinite_in_a_row = 0
        self._unread: list[tuple[int, tuple[str, ...], torch.Tensor]] = []  # updates, and 1 where they were left out
        self._stop = StopRequest(output)

        self._averaged_network = copy.deepcopy(task.networks[task.averaged]).cpu().eval()
        self.networks: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for name, network in task.networks.items():
            optimizer = make_optimizer(config, network, **task.optimizers.get(name, {}))
            # One network at a time: FSDP2 takes no more. The wrapper of the optimizer is left aside, since it updates
            # the loss scale once for each of several optimizers.
            self.networks[name], wrapper = accelerator.prepare(network, optimizer)
            self.optimizers[name] = wrapper.optimizer
        self.ema = EMAModel(local_parts(self._averaged_parameters()), decay=config.ema_decay, foreach=True)
        goes_on = config.resume and from_main_process(has_checkpoints(self.checkpoints))
        if goes_on:
            self._load()
        self.schedulers = {name: make_schedule(config, each, self.step) for name, each in self.optimizers.items()}
        plain = {  # tensorboard takes nothing else
            key: value if isinstance(value, int | float | str) else str(value)
            for key, value in (run_settings or {}).items()
        }
        for name in (METRICS, SPEED):  # what was written after the checkpoint counts no more
            by_main_process(partial(trim_lines, output / name, self.step if goes_on else -1))
        with together():
            accelerator.init_trackers(TRACKER, config=plain)
        precision = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.mixed_precision]
        self._throughput = Throughput(accelerator.device, precision, config.batch_size, sequence_length)

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
        with progress, self._stop.on_signals():
            with self._throughput.paused():
                if self.step == 0 and config.evaluate_every:
                    self._evaluate()  # the start to compare with; and what cannot be measured should fail now
            while self.step < config.num_steps:
                last = self.step + 1 == config.num_steps
                logged = last or (self.step + 1) % config.log_every == 0
                with self._throughput.step():
                    metrics = self.train_step(logged)
                if logged:
                    progress.set_postfix(self._log(metrics), refresh=False)
                    self._write(self._throughput.read(), SPEED)
                progress.update()
                if self._save_and_evaluate(last):
                    logger.warning("stopped after step %d; go on with training.resume=true", self.step)
                    break
        return self.step == config.num_steps

    def _save_and_evaluate(self, last: bool) -> bool:
        """What is due after a step; whether the run is to stop here."""
        config = self.config
        save_due = last or self.step % config.checkpoint_every == 0
        evaluation_due = last or bool(config.evaluate_every and self.step % config.evaluate_every == 0)
        saved, best = False, None
        if save_due or evaluation_due:
            with self._throughput.paused():
                saved = save_due and self._save()
                best = self._evaluate() if evaluation_due else None
        stop = not last and (self._stop.is_made() or 0 < config.max_steps <= self.step)
        if not saved and (last or stop or best is not None):
            with self._throughput.paused():
                saved = self._save()
        if not saved and (last or stop):
            raise OSError(f"the run ends after step {self.step} without a checkpoint of it; see the warning above")
        if saved and best is not None:
            self._mark_best(best)
        return stop

    def train_step(self, measured: bool) -> dict[str, torch.Tensor]:
        """All updates of one step; metrics, each a sum and a number, if it is to be measured."""
        metrics: dict[str, torch.Tensor] = {}
        for number, update in enumerate(self.task.updates):
            metrics |= self._update(number, update, measured)
        for scheduler in self.schedulers.values():
            scheduler.step()
        self.ema.step(local_parts(self._averaged_parameters()))
        self.step += 1
        return metrics

    def averaged_network(self) -> ModelMixin:
        """A copy of the averaged network with the averaged weights, on the CPU; all processes call it."""
        averages = gather(self._averages())
        with torch.no_grad():
            for name, parameter in trained_parameters(self._averaged_network).items():
                parameter.copy_(averages[name])
        return self._averaged_network

    def _update(self, number: int, update: tuple[str, ...], measured: bool) -> dict[str, torch.Tensor]:
        """One optimizer step of the networks named in `update`, unless a loss or gradient is not finite."""
        config, accelerator = self.config, self.accelerator
        torch.manual_seed(derive_seed(config.seed, self.step, number, accelerator.process_index))  # for dropout
        num_parts = config.gradient_accumulation_steps
        share = config.batch_size // (accelerator.num_processes * num_parts)
        metrics: dict[str, torch.Tensor] = {}
        finite = torch.ones((), device=accelerator.device)
        for part in range(num_parts):
            first = (part * accelerator.num_processes + accelerator.process_index) * share
            places = range(first, first + share)
            generators = sample_generators(config.seed, self.step, number, places=places)
            batch = self.draw_batch(self.step, places, generators)
            with contextlib.ExitStack() as stack:
                if part < num_parts - 1:
                    for name in update:
                        stack.enter_context(accelerator.no_sync(self.networks[name]))
                with accelerator.autocast():
                    losses, measures = self.task.losses(self.networks, update, batch, generators, measured)
                loss = torch.stack(list(losses.values())).sum() / num_parts
                (loss * self.loss_scale.value).backward()
            finite = finite * loss.detach().isfinite()
            metrics |= {key: metrics.get(key, 0) + _sum_and_number(value) for key, value in measures.items()}
        for name in update:
            norm = self._clip_gradients(name)
            metrics[f"{name}_grad_norm"] = _sum_and_number(norm)
            finite = finite * norm.isfinite()

        # All processes have to agree before any of them lets its optimizer see the gradients.
        left_out = 1 - accelerator.gather(finite[None]).min()
        for name in update:
            self.optimizers[name].found_inf = left_out  # type: ignore[attr-defined]  # where it is 1 nothing changes
            self.optimizers[name].grad_scale = None  # type: ignore[attr-defined]
            self.optimizers[name].step()
        for optimizer in self.optimizers.values():  # a loss may have flowed through networks that did not learn from it
            optimizer.zero_grad()
        for network in self.networks.values():
            reshard(network)
        self._unread.append((self.step, update, left_out))
        if measured or self.loss_scale.enabled:
            self._count_nonfinite()
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

    def _count_nonfinite(self) -> None:
        """Read which updates were left out: the one place where the host waits for the device."""
        flags = torch.stack([left_out for _, _, left_out in self._unread]).tolist()
        for (step, update, _), left_out in zip(self._unread, flags, strict=True):
            scaled_down = self.loss_scale.update(not left_out)
            if not left_out:
                self._nonfinite_in_a_row = 0
            elif not scaled_down:  # otherwise it is how the loss scale finds its size
                self._nonfinite_in_a_row += 1
                logger.warning("step %d: a loss or gradient of %s is not finite; skipped", step, "/".join(update))
            if self._nonfinite_in_a_row >= self.config.max_nonfinite_steps:
                raise FloatingPointError(
                    f"{self._nonfinite_in_a_row} updates in a row had no finite loss and gradients (step {step}); "
                    "lower the learning rates and go on from the last checkpoint (training.resume=true)"
                )
        self._unread.clear()

    def _log(self, metrics: dict[str, torch.Tensor]) -> dict[str, float]:
        """Average the metrics over processes and write them down."""
        accelerator = self.accelerator
        sums, numbers = accelerator.gather(torch.stack(list(metrics.values()))[None]).sum(0).unbind(-1)
        values = dict(zip(metrics, (sums / numbers).tolist(), strict=True))
        values["learning_rate"] = self.schedulers[self.task.averaged].get_last_lr()[0]
        self._write(values)
        for message in self.alarms(values):
            logger.warning("step %d: %s", self.step, message)
            if self.alarms.config.stop:
                self._stop.make()
        return {
            key: float(f"{value:.3g}") for key, value in values.items() if "_rate" not in key and "_norm" not in key
        }

    def _evaluate(self) -> float | None:
        """Measure and write down; the measure that the best checkpoint is chosen by, if it is lower than any before."""
        if self.evaluate is None:
            return None
        network = self.averaged_network()
        try:
            with together():
                measures = self.evaluate(network, self.step, self._heartbeat)
        except Stopped:
            logger.warning("the evaluation of step %d was left, to stop", self.step)
            return None
        except Exception as error:  # whatever it is, what was learnt is worth more
            if on_any_process(isinstance(error, Hopeless)) or self.step == 0:
                raise
            logger.warning("the evaluation of step %d failed: %s", self.step, error, exc_info=True)
            return None
        finally:
            self._averaged_network.cpu()
        if measures:
            self._write(measures)
        return from_main_process(self._if_best(measures) if self.accelerator.is_main_process else None)

    def _if_best(self, measures: dict[str, float]) -> float | None:
        measure, best = self.config.keep_best, best_checkpoint(self.checkpoints)
        value = measures.get(measure)
        return value if value is not None and (best is None or best[1] != measure or value < best[2]) else None

    def _heartbeat(self) -> None:
        if self._stop.is_made():
            raise Stopped

    def _write(self, values: dict[str, float], name: str = METRICS) -> None:
        try:
            self.accelerator.log(values, step=self.step)
        except OSError as error:  # a disk, or the tracker's server, on the main process alone
            logger.warning("the tracker did not take step %d: %s", self.step, error)
        if self.accelerator.is_main_process:
            append_line(self.output / name, {"step": self.step, **values})

    def _save(self) -> bool:
        return save_checkpoint(self.checkpoints, self.step, self.config.keep_checkpoints, self._contents())

    def _contents(self) -> Iterator[Callable[[Path], Path | None]]:
        """What a checkpoint holds, part by part: all processes gather a tensor, and one of them keeps and writes it."""
        process, num_processes = self.accelerator.process_index, self.accelerator.num_processes
        for name, tensors in self._saved_tensors():
            share = gather(tensors, kept_by(process, num_processes, tensors))
            yield partial(save_share, name, share, process, num_processes)
        counters = {
            "step": self.step,
            "averaged_steps": self.ema.optimization_step,
            "loss_scale": self.loss_scale.state_dict(),
        }
        yield partial(_write_text, json.dumps(counters) if self.accelerator.is_main_process else None, STATE)

    def _saved_tensors(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """The tensors of a checkpoint, and the name under which they are written."""
        for name in self.networks:
            network = self._unwrapped(name)
            yield name, trained_state(network)
            yield f"{name}.adam", adam_state(network, self.optimizers[name])
        yield AVERAGED, self._averages()

    def _load(self) -> None:
        """Go on from the newest whole checkpoint."""
        checkpoint = newest_checkpoint(self.checkpoints)
        for name, tensors in self._saved_tensors():
            restore(tensors, SavedTensors(checkpoint, name))
        counters = json.loads((checkpoint / STATE).read_text())
        self.step, self.ema.optimization_step = counters["step"], counters["averaged_steps"]
        self.loss_scale.load_state_dict(counters["loss_scale"])
        logger.info("resuming from %s", checkpoint)

    def _mark_best(self, value: float) -> None:
        if self.accelerator.is_main_process:
            mark_best(self.checkpoints, self.step, self.config.keep_best, value, self.config.keep_checkpoints)

    def _averages(self) -> dict[str, torch.Tensor]:
        names = trained_parameters(self._unwrapped(self.task.averaged))
        averages = shards_like(self._averaged_parameters(), self.ema.shadow_params)
        return dict(zip(names, averages, strict=True))

    def _averaged_parameters(self) -> list[torch.Tensor]:
        return list(trained_parameters(self._unwrapped(self.task.averaged)).values())

    def _unwrapped(self, name: str) -> nn.Module:
        return self.accelerator.unwrap_model(self.networks[name])


def _write_text(text: str | None, name: str, folder: Path) -> Path | None:
    if text is None:
        return None
    (folder / name).write_text(text)
    return folder / name


def _sum_and_number(metric: torch.Tensor) -> torch.Tensor:
    metric = metric.detach().float()
    return metric if metric.ndim else torch.stack([metric, torch.ones_like(metric)])
