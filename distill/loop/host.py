"""What processes tell each other over gloo: it takes what is in the host's memory, so that no device is waited for, and
it waits for hours, where NCCL gives up after ten minutes."""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from typing import Any

import torch
from torch import distributed

PATIENCE = timedelta(hours=2)  # also with processes that never come


@cache
def _group() -> Any:
    """Made by all processes together, the first time that they have something to tell."""
    return distributed.new_group(backend="gloo", timeout=PATIENCE)


def _alone() -> bool:
    return not distributed.is_initialized() or distributed.get_world_size() == 1


def on_any_process(value: bool) -> bool:
    """Whether it is so on any process; all call it, and all get the same answer."""
    if _alone():
        return value
    found = torch.tensor(int(value))
    distributed.all_reduce(found, distributed.ReduceOp.MAX, group=_group())
    return bool(found)


def gather_on_host(value: Any) -> list[Any]:
    """The values of all processes, by rank; all call it. What is not a tensor is pickled."""
    if _alone():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value, group=_group())
    return values


def from_main_process(value: Any) -> Any:
    """The main process's value; all call it."""
    if _alone():
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0, group=_group(), device=torch.device("cpu"))
    return values[0]
