"""Alarms of a training that is going wrong: losses do not tell, some metrics do; which ones, its method says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from distill.config import setting


@dataclass
class AlarmConfig:
    """When a training is taken to have gone wrong, and what then."""

    patience: int = setting(3, "lines of metrics in a row that have to show it")
    stop: bool = setting(False, "end the run, with a checkpoint; otherwise it is a warning")

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"alarms.patience={self.patience} must be at least 1")


class Alarms:
    """Called with the metrics of each line; returns what to say of those alarms that sound with this one.

    `limits` are of each metric what it must not fall below, what it must not rise above, and what it means if it does.
    """

    def __init__(self, config: AlarmConfig, limits: Iterable[tuple[str, float, float, str]]):
        self.config, self.limits = config, list(limits)
        self._in_a_row: dict[str, int] = {}

    def __call__(self, metrics: dict[str, float]) -> list[str]:
        patience, messages = self.config.patience, []
        for name, lowest, highest, meaning in self.limits:
            is_wrong = metrics[name] < lowest or metrics[name] > highest
            self._in_a_row[name] = self._in_a_row.get(name, 0) + 1 if is_wrong else 0
            if self._in_a_row[name] == patience:
                messages.append(f"{name} has been {meaning} for {patience} lines of metrics ({metrics[name]:.3g})")
        return messages
