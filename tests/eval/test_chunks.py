"""Features that processes share through a folder."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from eval.chunks import CHUNK_SIZE, claim, from_images, read_chunks, write_chunks
from eval.classifier import train_classifier
from eval.real import make_features
from teachers.data import DataConfig

ROOT = Path(__file__).parents[2]


class Maker:
    """Makes the squares of numbers, and counts how often it is asked for which."""

    def __init__(self):
        self.asked = []

    def __call__(self, numbers):
        self.asked.append(int(numbers[0]))
        return {"squares": numbers**2}


def test_what_is_there_is_not_made_again(tmp_path):
    maker = Maker()
    write_chunks(tmp_path, "images", 250, maker)
    assert maker.asked == [0, 100, 200]
    (tmp_path / "images-00001.safetensors").unlink()
    write_chunks(tmp_path, "images", 250, maker)
    assert maker.asked[3:] == [100]
    assert torch.equal(read_chunks(tmp_path, "images", 250)["squares"], torch.arange(250) ** 2)


def test_a_process_makes_what_others_are_not_at_and_what_a_dead_one_has_left(tmp_path):
    maker = Maker()
    worker = threading.Thread(target=write_chunks, args=(tmp_path, "images", 500, maker))
    with (tmp_path / ".images-00002.safetensors.lock").open("w") as lock:  # as a process that is at the third holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        worker.start()
        while len(maker.asked) < 4:
            time.sleep(0.01)
        time.sleep(0.2)
        assert worker.is_alive()
        assert maker.asked == [0, 100, 300, 400]
    worker.join(timeout=60)  # its end frees the lock
    assert maker.asked == [0, 100, 300, 400, 200]


def test_a_chunk_is_the_same_whoever_makes_it(teacher, tmp_path):
    """All by one, and each of three by a process that makes it alone, the last one first."""
    make = from_images(teacher, lambda images: {"features": images.flatten(1)}, seed=3)
    write_chunks(tmp_path / "one", "images", 250, make)
    for numbers in reversed(torch.arange(250).split(CHUNK_SIZE)):
        path = tmp_path / "one" / f"images-{int(numbers[0]) // CHUNK_SIZE:05d}.safetensors"
        written = path.read_bytes()
        path.unlink()
        write_chunks(tmp_path / "one", "images", 250, make)
        assert path.read_bytes() == written
    found = read_chunks(tmp_path / "one", "images", 250)
    assert found["rows"].tolist() == [number % 10 for number in range(250)]
    assert found["nfe"].tolist() == [4] * 250


def test_a_folder_is_of_one_protocol(tmp_path):
    claims = [threading.Thread(target=claim, args=(tmp_path / "out", {"seed": 0})) for _ in range(4)]
    for thread in claims:
        thread.start()
    for thread in claims:
        thread.join()
    claim(tmp_path / "out", {"seed": 0})
    with pytest.raises(ValueError, match=r"other settings: images, seed \("):
        claim(tmp_path / "out", {"seed": 1, "images": 5})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(ValueError, match="not empty"):
        claim(tmp_path / "other", {"seed": 0})
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def evaluation(output, num_images=50_000, launcher=()):
    """Of images of a teacher in the current folder."""
    command = [sys.executable, *launcher, ROOT / "scripts" / "evaluate.py", "teacher"]
    command += ["--num-images", str(num_images), "--output", output]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def peak_memory(process):
    """In MiB, once it has ended."""
    _, _, usage = os.wait4(process.pid, 0)
    return usage.ru_maxrss / 1024


def test_of_the_processes_of_a_launch_one_reports(teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher.save_pretrained("teacher")
    monkeypatch.setattr("eval.classifier.train_classifier", lambda *given: train_classifier(*given, num_steps=2))
    make_features(DataConfig(), Path("runs/classifier"))
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    process = evaluation("out", 300, launcher)
    results = [line for line in process.communicate(timeout=120)[0].splitlines() if line.startswith("{")]
    assert process.returncode == 0
    assert len(results) == 1
    assert json.loads(results[0])["protocol"]["num_images"] == 300


@pytest.mark.slow
def test_fifty_thousand_images_outlive_a_process_that_is_killed(teacher, tmp_path, monkeypatch):
    """Two processes that know nothing of each other; one is killed on its way, the other ends with the figures."""
    monkeypatch.chdir(tmp_path)
    teacher.save_pretrained("teacher")
    started = time.monotonic()
    processes = [evaluation("out"), evaluation("out")]
    while len(list(Path("out").glob("images-*"))) < 200:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    processes[0].send_signal(signal.SIGKILL)
    result = json.loads(processes[1].stdout.read().splitlines()[-1])
    memory = peak_memory(processes[1])
    few = evaluation("few", 500)
    json.loads(few.stdout.read().splitlines()[-1])
    assert (result["nfe"], result["protocol"]["num_images"]) == (4, 50_000)
    print(f"\n{time.monotonic() - started:.0f} s, {memory:.0f} MiB at most")
    assert memory < peak_memory(few) + 800  # a hundred times the images; all pairs of them would be 20,000
    # With what is there, the figures are worked out again.
    again = evaluation("out")
    assert json.loads(again.stdout.read().splitlines()[-1]) == result
