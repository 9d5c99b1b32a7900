from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from teachers.shards import MappedRows, shards_of


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.float16])
def test_rows_are_read_from_whichever_shard_they_lie_in(tmp_path, dtype):
    whole = torch.arange(70).view(10, 7).to(dtype)
    for path, rows in shards_of(tmp_path / "tokens.safetensors", 10, 4).items():
        save_file({"tokens": whole[rows.start : rows.stop]}, path)
    mapped = MappedRows(sorted(tmp_path.iterdir()), "tokens")
    assert (len(mapped), mapped.shape) == (10, (10, 7))
    rows = torch.tensor([9, 0, 4, 3, 3, 7])
    assert mapped[rows].dtype == dtype
    assert torch.equal(mapped[rows].long(), whole.long()[rows])
    with pytest.raises(IndexError):
        mapped[torch.tensor([10])]


def test_every_row_has_one_shard():
    shards = shards_of(Path("folder/tokens.safetensors"), 10, 4)
    assert list(shards.values()) == [range(0, 4), range(4, 8), range(8, 10)]
    assert next(iter(shards)) == Path("folder/tokens-00000-of-00003.safetensors")


def resident(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024


def test_what_is_not_asked_for_takes_no_memory(tmp_path):
    save_file({"tokens": torch.zeros(100_000, 512, dtype=torch.uint16)}, tmp_path / "tokens.safetensors")  # 100 MB
    before = resident("VmRSS")
    mapped = MappedRows([tmp_path / "tokens.safetensors"], "tokens")
    assert resident("VmRSS") - before < 10
    anonymous = resident("RssAnon")
    for rows in torch.arange(len(mapped)).split(1000):
        mapped[rows]
    assert resident("RssAnon") - anonymous < 10  # what the system keeps of the file, it gives up when it must
