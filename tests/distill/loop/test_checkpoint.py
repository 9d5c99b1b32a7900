import contextlib
import random
import resource
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distill.loop.checkpoint import best_checkpoint, mark_best, newest_checkpoint, save_checkpoint, verify_checkpoint


def contents(step):
    yield partial(write_tensors, step=step)
    yield write_config


def write_tensors(folder, step):
    save_file({"weights": torch.full((1000,), float(step))}, folder / "model.safetensors")
    return folder / "model.safetensors"


def write_config(folder):
    (folder / "config.json").write_text('{"hidden_size": 16, "name": "a student"}')
    return folder / "config.json"


@pytest.fixture
def save(tmp_path):
    def save(step, keep=3, directory=tmp_path, more=()):
        assert save_checkpoint(directory, step, keep, [*contents(step), *more])
        return directory / f"step-{step:06d}"

    return save


def files(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept(save, tmp_path):
    for step in (2, 10, 999_999, 1_000_000):
        save(step, keep=2)
    assert names(tmp_path) == ["step-1000000", "step-999999"]
    assert newest_checkpoint(tmp_path).name == "step-1000000"
    assert verify_checkpoint(tmp_path / "step-999999") == 999_999


def test_the_best_is_kept_beside_them(save, tmp_path):
    assert best_checkpoint(tmp_path) is None
    for step in (1, 2):
        save(step, keep=1)
        mark_best(tmp_path, step, "fd", 5.0 - step, keep=1)
    for step in (3, 4):
        save(step, keep=1)
    assert best_checkpoint(tmp_path) == (tmp_path / "step-000002", "fd", 3.0)
    assert {"step-000002", "step-000004"} == {path.name for path in tmp_path.glob("step-*")}


def damage(path, generator):
    """Change a file in one of the ways in which disks and copies do; False where that changed nothing."""
    original = path.read_bytes()
    position = generator.randrange(len(original))
    kind = generator.choice(["bit", "bit", "bit", "truncate", "append", "zeros", "remove", "swap"])
    changed = bytearray(original)
    if kind == "bit":
        changed[position] ^= 1 << generator.randrange(8)
    elif kind == "truncate":
        del changed[position:]
    elif kind == "append":
        changed += bytes(generator.randrange(1, 100))
    elif kind == "zeros":
        end = min(len(changed), position + 512)
        changed[position:end] = bytes(end - position)
    elif kind == "swap":
        changed = changed[position:] + changed[:position]
    if kind == "remove":
        path.unlink()
    else:
        path.write_bytes(changed)
    return kind == "remove" or bytes(changed) != original


def test_a_thousand_random_corruptions_are_all_found(save, tmp_path):
    """`pytest -k thousand -s` prints how many."""
    checkpoint, pristine = save(1), tmp_path / "pristine"
    shutil.copytree(checkpoint, pristine)
    generator, found, accepted = random.Random(0), 0, []
    while found + len(accepted) < 1000:
        path = generator.choice(files(checkpoint))
        if not damage(path, generator):
            continue
        try:
            verify_checkpoint(checkpoint)
            accepted.append(path.name)
        except ValueError:
            found += 1
        path.write_bytes((pristine / path.relative_to(checkpoint)).read_bytes())
    print(f"\n{found} corruptions found, {len(accepted)} accepted")
    assert not accepted
    assert verify_checkpoint(checkpoint) == 1


def test_every_flipped_bit_of_the_manifest_is_found(save):
    checkpoint = save(12)
    path = checkpoint / "manifest.json"
    original = path.read_bytes()
    for position in range(len(original)):
        for bit in range(8):
            damaged = bytearray(original)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"SHA-256|damaged|lacks|bytes|manifest"):
                verify_checkpoint(checkpoint)


def test_a_damaged_newest_checkpoint_is_passed_over(save, tmp_path, caplog):
    save(1)
    newest = save(2)
    (newest / "model.safetensors").write_bytes(b"")
    assert newest_checkpoint(tmp_path).name == "step-000001"
    assert "step-000002" in caplog.text
    save(2)
    assert newest_checkpoint(tmp_path).name == "step-000002"


def test_a_failure_that_is_not_the_disks_is_not_hidden(save, tmp_path):
    save(1)

    def fail(folder):
        raise TypeError("a mistake of ours")

    with pytest.raises(TypeError, match="a mistake of ours"):
        save(2, more=[fail])
    assert newest_checkpoint(tmp_path).name == "step-000001"
    save(3)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001", "step-000003"}


@contextlib.contextmanager
def largest_file(num_bytes):
    """The kernel refuses to let a file grow past it, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def small_disk(folder):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs takes rights that this user has not")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("num_bytes", [0, 100, 2000, 4500])
def test_a_disk_that_takes_no_more_costs_that_checkpoint_alone(save, tmp_path, caplog, num_bytes):
    save(1)
    with largest_file(num_bytes):
        saved = save_checkpoint(tmp_path, 2, 1, contents(2))
    if num_bytes < 4500:
        assert not saved
        assert "could not be saved" in caplog.text
        assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
        assert verify_checkpoint(tmp_path / "step-000001") == 1
    save(3, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_a_full_disk(save, tmp_path, caplog):
    """A file system of 64 kB, of which checkpoints of 4 kB are let be kept until there is no room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk):
        saved = [save_checkpoint(disk, step, 100, contents(step)) for step in range(1, 12)]
        num_saved = saved.index(False)
        assert 2 <= num_saved <= 8
        assert not any(saved[num_saved:])
        assert "No space left on device" in caplog.text
        assert newest_checkpoint(disk).name == f"step-{num_saved:06d}"
        assert not list(disk.glob(".staging-*"))
        shutil.rmtree(disk / "step-000001")
        assert save_checkpoint(disk, 12, 100, contents(12))


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        newest_checkpoint(tmp_path)


def test_a_best_that_cannot_be_read_counts_for_nothing(tmp_path, caplog):
    Path(tmp_path / "best.json").write_text('{"step": ')
    assert best_checkpoint(tmp_path) is None
    assert "damaged" in caplog.text
