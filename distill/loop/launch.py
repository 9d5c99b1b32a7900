"""The processes of `accelerate launch --cpu --num_processes N`, whether a command line or a file asks for them.

Accelerate leaves the start of several CPU processes to MPI; without it (as of 1.15) that command silently runs one. So
the script that finds itself alone starts them, which needs neither MPI nor another launcher.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from torch.multiprocessing.spawn import ProcessExitedException, start_processes


def run_processes(function: Callable[[], object]) -> None:
    """Call the function in as many CPU processes as the launcher was asked for, or here if this process is one of them.

    Where a process fails the others are ended, and this one exits with its status.
    """
    num_processes = _requested_cpu_processes()
    if num_processes == 1:
        function()
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked, so that nothing is imported twice; torch has not computed anything yet, so that it has no threads to lose.
    group = start_processes(_process, (function, num_processes, port), num_processes, join=False, start_method="fork")
    assert group is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; they decide when to leave
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, partial(_pass_on, group.processes))
    try:
        while not group.join():
            pass
    except ProcessExitedException as failure:
        sys.exit(failure.exit_code)


def asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def _pass_on(processes: Iterable[BaseProcess], number: int, frame: object) -> None:
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, number)


def _process(rank: int, function: Callable[[], object], num_processes: int, port: int) -> None:
    environment: dict[str, object] = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": num_processes,
        "LOCAL_WORLD_SIZE": num_processes,
    }
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    function()


def _requested_cpu_processes() -> int:
    """What the launcher was asked for, where it started this process alone; else 1."""
    parent = psutil.Process().parent()
    launcher = parent.cmdline()[: -len(sys.argv)] if parent else []  # what follows is the script and its arguments
    by_accelerate = any("accelerate" in Path(word).name for word in launcher)
    if "WORLD_SIZE" in os.environ or not asked("ACCELERATE_USE_CPU") or not by_accelerate:
        return 1
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    parser.add_argument("--num_machines", "--num-machines", type=int)
    parser.add_argument("--config_file", "--config-file")
    parser.add_argument("--cpu", action="store_true")
    arguments, _ = parser.parse_known_args(launcher)
    num_processes, num_machines = arguments.num_processes, arguments.num_machines
    if arguments.config_file or (os.path.isfile(default_config_file) and not arguments.cpu):  # as the launcher does
        file: Any = load_config_from_file(arguments.config_file)
        num_processes = file.num_processes if num_processes is None else num_processes
        num_machines = file.num_machines if num_machines is None else num_machines
    return num_processes or 1 if (num_machines or 1) == 1 else 1
