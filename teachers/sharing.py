"""Work that processes share through the file system: nobody waits at a barrier, and nobody has to come back."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

_held: dict[Path, TextIO] = {}  # locks that last as long as this process


def hold(folder: Path) -> bool | None:
    """Whether a folder is this process's until it ends; not while another one has it.

    None on a file system without locks, where nobody can tell.
    """
    path = folder.resolve() / ".lock"
    if path not in _held:
        file = path.open("w")
        locked = _locked(file.fileno(), waits=False)
        if not locked:
            file.close()
            return locked
        _held[path] = file
    return True


def each_once(results: Iterable[Path]) -> Iterator[Path]:
    """Those of the files (or folders) that are not there, each for this process to make, while it holds their lock.

    Any number of processes may go through the same list: each takes what nobody is at. When it has been through, it
    waits for those that others are at, however long that takes, and makes what a process that died has left. Once the
    loop is over, all are there.

    On a file system without locks all make all: results are renamed into place whole, so that this costs time alone.
    """
    for waits in (False, True):
        for result in results:
            if result.exists():
                continue
            result.parent.mkdir(parents=True, exist_ok=True)
            with result.with_name(f".{result.name}.lock").open("w") as lock:
                if _locked(lock.fileno(), waits) is not False and not result.exists():
                    yield result


def _locked(file: int, waits: bool) -> bool | None:
    """Whether this process has the lock, which it loses with the file; None of a file system that knows none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
