"""Rows that lie in many files, and are read from them when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


def shards_of(path: Path, num_rows: int, shard_size: int) -> dict[Path, range]:
    """The files that rows are divided into, `tokens-00002-of-00016.safetensors` for a path `tokens.safetensors`, and
    the rows of each."""
    starts = range(0, num_rows, shard_size)
    return {
        path.with_name(f"{path.stem}-{number:05d}-of-{len(starts):05d}{path.suffix}"): range(
            start, min(start + shard_size, num_rows)
        )
        for number, start in enumerate(starts)
    }


class MappedRows:
    """The rows (N, ...) of a tensor in safetensors shards: `mapped[rows]` reads those rows (B,) -> (B, ...).

    The files are mapped into memory: of what has been read, the system keeps as much as there is room for.
    """

    def __init__(self, paths: Sequence[Path], name: str):
        self._shards = [load_file(path)[name].numpy() for path in paths]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        self.shape = (int(self._ends[-1]), *self._shards[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        numbers = np.searchsorted(self._ends, rows.numpy(), side="right")
        places = rows.numpy() - self._ends[numbers]  # counted from the shard's end
        return torch.from_numpy(
            np.stack([self._shards[number][place] for number, place in zip(numbers, places, strict=True)])
        )
