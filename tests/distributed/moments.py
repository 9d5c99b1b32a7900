"""Kill a process at every moment of a save, and look at what is left.

    python tests/distributed/moments.py FOLDER

Each save is a fork of this process, which holds next to nothing: a fork needs the memory of the process it is made
from, and a test's process may by then hold gigabytes. The last line of stdout is the result as JSON.
"""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch

from distill.loop.checkpoint import newest_checkpoint, save_checkpoint, verify_checkpoint
from distill.loop.state import save_share

STEPS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir")


def contents(step):
    yield partial(save_share, "model", {"weights": torch.full((10,), float(step))}, 0, 1)
    yield partial(write_counters, step)


def write_counters(step, folder):
    (folder / "trainer.json").write_text(json.dumps({"step": step}))
    return folder / "trainer.json"


def die_at(call, directory):
    """Save a second checkpoint, in which the process kills itself before its `call`-th step on the file system."""
    calls = 0

    def count(event, arguments):
        nonlocal calls
        if event in STEPS and str(directory) in " ".join(map(str, arguments)):
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    save_checkpoint(directory, 2, 1, contents(2))


def killed(call, directory) -> bool:
    process = os.fork()
    if not process:
        die_at(call, directory)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert status in (0, signal.SIGKILL), status
    return status != 0


def main(folder: Path) -> None:
    steps_seen = []
    for call in range(1, 100):
        directory = folder / str(call)
        save_checkpoint(directory, 1, 1, contents(1))
        was_killed = killed(call, directory)
        steps_seen.append(verify_checkpoint(newest_checkpoint(directory)))
        save_checkpoint(directory, 3, 1, contents(3))
        assert [path.name for path in directory.iterdir()] == ["step-000003"]
        if not was_killed:
            break
    print(json.dumps({"moments": call, "steps_seen": steps_seen}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
