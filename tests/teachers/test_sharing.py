"""Processes that go through one list of files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from teachers.folder import new_file
from teachers.sharing import each_once, hold

WORKER = """
import os, sys, time
from pathlib import Path
from teachers.folder import new_file
from teachers.sharing import each_once
folder, pause, num_workers = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
(folder / f"ready-{os.getpid()}").touch()
while len(list(folder.glob("ready-*"))) < num_workers:  # importing takes some of them longer than others
    time.sleep(0.01)
for path in each_once([folder / str(number) for number in range(8)]):
    with (folder / "log").open("a") as log:
        log.write(f"{path.name} {os.getpid()}\\n")
    time.sleep(pause)
    with new_file(path) as staging:
        staging.write_text(path.name)
assert all((folder / str(number)).exists() for number in range(8))
"""


def start(folder, pause, num_workers=1):
    command = [sys.executable, "-c", WORKER, str(folder), str(pause), str(num_workers)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})


def made(folder):
    log = folder / "log"
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def test_each_is_made_once_and_all_are_there_in_the_end(tmp_path):
    workers = [start(tmp_path, 0.1, num_workers=3) for _ in range(3)]
    assert [worker.wait(timeout=240) for worker in workers] == [0, 0, 0]
    assert sorted(name for name, _ in made(tmp_path)) == [str(number) for number in range(8)]
    assert len({process for _, process in made(tmp_path)}) > 1


def test_what_a_dead_process_had_begun_is_made_by_one_that_waits(tmp_path):
    slow = start(tmp_path, 60)
    while not made(tmp_path):
        time.sleep(0.01)
    other = start(tmp_path, 0)
    while len(made(tmp_path)) < 8:
        time.sleep(0.01)
    time.sleep(0.3)
    assert other.poll() is None  # it waits for the one that is left
    os.kill(slow.pid, signal.SIGKILL)
    slow.wait()
    assert other.wait(timeout=240) == 0
    begun = [name for name, _ in made(tmp_path)]
    assert sorted(begun) == sorted(["0", *map(str, range(8))])


def test_without_locks_work_is_done_all_the_same(tmp_path, monkeypatch):
    def unknown(*arguments):
        raise OSError("no locks here")

    monkeypatch.setattr("fcntl.flock", unknown)
    for path in each_once([tmp_path / "a", tmp_path / "b"]):
        with new_file(path) as staging:
            staging.touch()
    assert {"a", "b"} <= {path.name for path in tmp_path.iterdir()}
    assert [hold(tmp_path), hold(tmp_path)] == [None, None]
