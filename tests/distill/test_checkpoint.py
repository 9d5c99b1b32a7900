import pytest
import torch
from accelerate import Accelerator

from distill.checkpoint import newest_checkpoint, save_checkpoint, verify_checkpoint


@pytest.fixture
def save(tmp_path):
    accelerator = Accelerator(cpu=True)
    network = torch.nn.Linear(4, 4)
    accelerator.prepare(network, torch.optim.Adam(network.parameters()))
    return lambda step, keep=3, write=lambda folder: None: save_checkpoint(accelerator, tmp_path, step, keep, write)


def files(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def test_the_newest_are_kept(save, tmp_path):
    for step in (2, 10, 100):
        save(step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-000100"]
    assert newest_checkpoint(tmp_path).name == "step-000100"
    assert verify_checkpoint(tmp_path / "step-000010") == 10


def test_one_flipped_bit_anywhere_is_found(save, tmp_path):
    checkpoint = save(1)
    assert len(files(checkpoint)) >= 4
    for path in files(checkpoint):
        original = path.read_bytes()
        for position in (0, len(original) // 2, len(original) - 1):
            damaged = bytearray(original)
            damaged[position] ^= 0x10
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"SHA-256|damaged|lacks|bytes|manifest"):
                verify_checkpoint(checkpoint)
        path.write_bytes(original)
    verify_checkpoint(checkpoint)


def test_truncated_and_missing_files_are_found(save):
    checkpoint = save(1)
    for path in files(checkpoint):
        original = path.read_bytes()
        path.write_bytes(original[:-1])
        with pytest.raises(ValueError, match=r"bytes|damaged"):
            verify_checkpoint(checkpoint)
        path.unlink()
        with pytest.raises(ValueError, match=r"lacks|no manifest"):
            verify_checkpoint(checkpoint)
        path.write_bytes(original)


def test_a_damaged_newest_checkpoint_is_passed_over(save, tmp_path, caplog):
    save(1)
    newest = save(2)
    (newest / "model.safetensors").write_bytes(b"")
    assert newest_checkpoint(tmp_path).name == "step-000001"
    assert "step-000002" in caplog.text


def test_a_failure_while_saving_leaves_the_earlier_checkpoint(save, tmp_path):
    save(1)

    def fail(folder):
        (folder / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save(2, write=fail)
    assert newest_checkpoint(tmp_path).name == "step-000001"
    save(3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000003"]


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        newest_checkpoint(tmp_path)
