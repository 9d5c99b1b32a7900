"""How processes share what they save."""

import stat

import pytest
import torch

from distill.loop.checkpoint import save_checkpoint
from distill.loop.state import SavedTensors, adam_state, kept_by, restore, save_share
from teachers import MaskGITTransformer
from teachers.folder import new_file, new_folder


@pytest.mark.parametrize("num_processes", [2, 8])
def test_all_keep_about_as_much_and_together_all(num_processes):
    with torch.device("meta"):
        network = MaskGITTransformer(1024, 1000, (16, 16))
    tensors = adam_state(network, torch.optim.AdamW(network.parameters()))
    shares = [kept_by(process, num_processes, tensors) for process in range(num_processes)]
    assert sorted(name for share in shares for name in share) == sorted(tensors)
    sizes = [sum(tensors[name].nbytes for name in share) for share in shares]
    assert max(sizes) < 1.05 * sum(sizes) / num_processes


def test_what_was_shared_out_is_read_as_one(tmp_path):
    tensors = {"a": torch.randn(5, 3), "b": torch.randn(7), "count": torch.tensor(3.0)}
    for process in range(4):  # more than there are tensors
        kept = kept_by(process, 4, tensors)
        share = {name: tensor for name, tensor in tensors.items() if name in kept}
        assert (save_share("net", share, process, 4, tmp_path) is None) == (not kept)
    save_share("net.adam", {"a": torch.zeros(1)}, 0, 1, tmp_path)
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    restore(found, SavedTensors(tmp_path, "net"))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match="another network"):
        restore({"a": torch.zeros(5, 3)}, SavedTensors(tmp_path, "net"))


def test_others_may_read_what_is_written(tmp_path):
    def save(folder):
        return save_share("net", {"a": torch.zeros(3)}, 0, 1, folder)

    assert save_checkpoint(tmp_path, 1, 1, [save])
    with new_file(tmp_path / "file") as staging:
        save_share("x", {"a": torch.zeros(3)}, 0, 1, tmp_path).rename(staging)
    with new_folder(tmp_path / "folder") as staging:
        save(staging)
    for path in (
        tmp_path / "step-000001" / "net.safetensors",
        tmp_path / "file",
        tmp_path / "folder" / "net.safetensors",
    ):
        assert path.stat().st_mode & stat.S_IRGRP, path
