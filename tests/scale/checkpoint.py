"""How long some processes take to write, sync and hash a checkpoint, and to verify it.

OMP_NUM_THREADS=1 PYTHONPATH=. python tests/scale/checkpoint.py FOLDER [--num-processes 2] [--gigabytes 1.6]
"""

import argparse
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState

from distill.loop.checkpoint import newest_checkpoint, save_checkpoint
from distill.loop.host import on_any_process
from distill.loop.state import gather, kept_by, save_share

NUM_TENSORS = 64


def save(folder, gigabytes):
    state = PartialState(cpu=True)
    process, num_processes = state.process_index, state.num_processes
    size = int(gigabytes * 1e9 / 4 / NUM_TENSORS)
    tensors = {str(number): torch.randn(size) for number in range(NUM_TENSORS)}
    on_any_process(False)
    start = time.perf_counter()
    share = gather(tensors, kept_by(process, num_processes, tensors))
    assert save_checkpoint(folder, 1, 1, [partial(save_share, "tensors", share, process, num_processes)])
    saved = time.perf_counter()
    newest_checkpoint(folder)
    if state.is_main_process:
        print(f"{num_processes} processes, {gigabytes} GB: saved in {saved - start:.1f} s, "
              f"verified in {time.perf_counter() - saved:.1f} s")  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-processes", type=int, default=1)
    parser.add_argument("--gigabytes", type=float, default=1.6)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    work = partial(save, folder, arguments.gigabytes)
    if arguments.num_processes == 1:
        work()
    else:
        torch.multiprocessing.start_processes(_process, (work, arguments.num_processes), arguments.num_processes)
    shutil.rmtree(folder)


def _process(rank, work, num_processes):
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
    os.environ.update({name: str(value) for name, value in (names | {"MASTER_PORT": 29533}).items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    work()


if __name__ == "__main__":
    main()
