"""What two processes tell each other."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from distill.loop.host import PATIENCE, from_main_process, gather_on_host, on_any_process

PROCESS = """
import contextlib, sys, time, torch
from accelerate import PartialState
from torch import distributed
from distill.loop.host import ElsewhereError, _group, by_main_process, from_main_process, gather_on_host
from distill.loop.host import on_any_process, together
rank = PartialState(cpu=True).process_index
assert [on_any_process(rank == 1), on_any_process(False)] == [True, False]
gathered = gather_on_host({"rank": rank, "rows": torch.full((2, rank + 1), float(rank))})
assert [value["rank"] for value in gathered] == [0, 1]
assert [tuple(value["rows"].shape) for value in gathered] == [(2, 1), (2, 2)]
if rank == 0:
    time.sleep(0.5)  # the other one waits
assert from_main_process(["a", 1] if rank == 0 else None) == ["a", 1]
assert distributed.get_backend(_group()) == "gloo"

def ends(work, failing, among=together):
    try:
        with among():
            work()
    except (ValueError, ElsewhereError) as error:
        assert (type(error), str(error)) == (ValueError if rank in failing else ElsewhereError, "no room")
    else:
        raise AssertionError
    assert gather_on_host(rank) == [0, 1]  # they are in step again

def fail():
    raise ValueError("no room")

for word in (lambda: gather_on_host([rank] * 9), lambda: on_any_process(True), lambda: from_main_process("a")):
    ends(lambda: fail() if rank == 1 else word(), {1})  # one is told by the other in place of an answer
ends(lambda: fail() if rank == 0 else None, {0})  # at the end
ends(fail, {0, 1})
with together():
    assert gather_on_host(rank) == [0, 1]
assert by_main_process(lambda: ["made", rank]) == ["made", 0]
ends(lambda: by_main_process(fail), {0}, contextlib.nullcontext)
"""


def test_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(port), "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS], env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]


def test_alone_there_is_nobody_to_wait_for():
    assert on_any_process(True)
    assert not on_any_process(False)
    assert gather_on_host("a") == ["a"]
    assert from_main_process(3) == 3
    assert PATIENCE.total_seconds() > 10 * 60
