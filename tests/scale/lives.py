"""Processes that may be killed, and what they took."""

import os
import signal
import time
import traceback
from collections.abc import Callable

import torch


def life(work: Callable[[], None], until: Callable[[], bool] = lambda: False) -> dict[str, float]:
    """Do the work in a process of its own, killed -9 once `until` says so; its seconds, and its peak memory in MiB.

    SystemExit if it fails. The caller must not have computed anything with torch, whose threads do not survive a fork.
    """
    process, start = os.fork(), time.monotonic()
    if process == 0:
        status = 0
        try:
            torch.set_num_threads(1)
            work()
        except BaseException:
            traceback.print_exc()
            status = 1
        os._exit(status)
    killed, ended = False, 0
    while not ended:
        if not killed and until():
            os.kill(process, signal.SIGKILL)
            killed = True
        ended, status, usage = os.wait4(process, os.WNOHANG)
        time.sleep(0.01)
    if status and not killed:
        raise SystemExit("it failed by itself")
    return {"seconds": round(time.monotonic() - start, 1), "peak_mib": round(usage.ru_maxrss / 1024)}
