"""Alarms of a distillation that is going wrong: losses do not tell, these do."""

from __future__ import annotations

import math
from dataclasses import dataclass

from distill.config import setting

MEANINGS = {
    "token_entropy": "next to nothing: the student has collapsed",
    "unique_tokens": "next to nothing: the student's images are all alike",
    "auxiliary_cross_entropy": "more than that of guessing: the auxiliary is lost, and the student with it",
}


@dataclass
class AlarmConfig:
    """When a distillation is taken to have gone wrong; also where the auxiliary's loss is above that of guessing."""

    lowest_token_entropy: float = setting(0.01, "nats per token of the student; below, each start has one outcome")
    lowest_unique_tokens: float = setting(0.01, "share of the codebook in a batch; below, all images are one")
    patience: int = setting(3, "lines of metrics in a row that have to show it")
    stop: bool = setting(False, "end the run, with a checkpoint; otherwise it is a warning")

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"alarms.patience={self.patience} must be at least 1")


class Alarms:
    """Called with the metrics of each line; returns what to say of those alarms that sound with this one."""

    def __init__(self, config: AlarmConfig, codebook_size: int):
        self.config, self.loss_of_guessing = config, math.log(codebook_size)
        self._in_a_row: dict[str, int] = {}

    def __call__(self, metrics: dict[str, float]) -> list[str]:
        config, messages = self.config, []
        wrong = {
            "token_entropy": metrics["token_entropy"] < config.lowest_token_entropy,
            "unique_tokens": metrics["unique_tokens"] < config.lowest_unique_tokens,
            "auxiliary_cross_entropy": metrics["auxiliary_cross_entropy"] > self.loss_of_guessing,
        }
        for name, is_wrong in wrong.items():
            self._in_a_row[name] = self._in_a_row.get(name, 0) + 1 if is_wrong else 0
            if self._in_a_row[name] == config.patience:
                messages.append(
                    f"{name} has been {MEANINGS[name]} for {config.patience} lines of metrics ({metrics[name]:.3g})"
                )
        return messages
