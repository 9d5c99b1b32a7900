"""What processes tell each other over gloo: it takes what is in the host's memory, so that no device is waited for, and
it waits for hours, where NCCL gives up after ten minutes.

All of it begins with a number from each process, so that one that has failed can say so in place of any answer.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from torch import distributed

PATIENCE = timedelta(hours=2)  # also with processes that never come
FAILED = -1


class ElsewhereError(RuntimeError):
    """Another process failed at what all do together; the message is its."""


@cache
def _group() -> Any:
    """Made by all processes together, the first time that they have something to tell."""
    return distributed.new_group(backend="gloo", timeout=PATIENCE)


def _alone() -> bool:
    return not distributed.is_initialized() or distributed.get_world_size() == 1


def _is_main() -> bool:
    return _alone() or distributed.get_rank() == 0


def on_any_process(value: bool) -> bool:
    """Whether it is so on any process; all call it, and all get the same answer."""
    return value if _alone() else any(_exchange(int(value)))


def gather_on_host(value: Any) -> list[Any]:
    """The values of all processes, by rank; all call it. They are pickled."""
    if _alone():
        return [value]
    content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    sizes = _exchange(len(content))
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(content)] = content
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded, group=_group())
    return [pickle.loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]


def from_main_process(value: Any) -> Any:
    """The main process's value; all call it."""
    return gather_on_host(value if _is_main() else None)[0]


def by_main_process(work: Callable[[], Any]) -> Any:
    """What comes of work that the main process does alone; where that fails all fail. All call it."""
    with together():
        return from_main_process(work() if _is_main() else None)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around what all processes do, and never within another: where one fails none goes on.

    The others get an ElsewhereError at the next thing that they tell each other, at the latest at the end.
    """
    try:
        yield
        on_any_process(False)
    except ElsewhereError:
        raise
    except Exception as error:
        if not _alone():
            _exchange(FAILED)
            gather_on_host(str(error))
        raise


def _exchange(number: int) -> list[int]:
    """The numbers of all processes; an ElsewhereError where another one has failed, unless this one has too."""
    numbers = torch.empty(distributed.get_world_size(), dtype=torch.int64)
    distributed.all_gather(list(numbers.split(1)), torch.tensor([number]), group=_group())
    found = numbers.tolist()
    if FAILED in found and number != FAILED:
        reasons = gather_on_host(None)
        raise ElsewhereError(reasons[found.index(FAILED)])
    return found
