"""Encoded prompts on disk, so that the text encoder need not stay in memory.

Shapes: N prompts, M different ones and the negative one, T text tokens, E text width, P pooled width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save_file
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from teachers.component import weights_digest
from teachers.conditions.condition import TextCondition
from teachers.conditions.prompts import encode_prompts, micro_conditions
from teachers.folder import new_file
from teachers.progress import progress_bar
from teachers.randomness import to_device
from teachers.shards import MappedRows, shards_of
from teachers.sharing import each_once

OF_THE_FILE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")  # no part of a network
PROMPTS = "prompts.parquet"  # each prompt, and the row of its encoding


class PromptCache:
    """What `write_prompt_cache` wrote: conditions of N prompts, mapped from disk.

    Raises FileNotFoundError where it is not there or not complete.
    """

    def __init__(self, folder: Path, image_size: tuple[int, int]):
        if not (folder / PROMPTS).is_file():
            raise FileNotFoundError(f"there are no (complete) encoded prompts in {folder}")
        self.folder, self.image_size = folder, image_size
        self._rows = torch.tensor(pyarrow.parquet.read_table(folder / PROMPTS, columns=["row"])["row"].to_numpy())
        shards = sorted(folder.glob("encoded-*.safetensors"))
        self._states, self._pooled = MappedRows(shards, "states"), MappedRows(shards, "pooled")
        self._negative = lru_cache(maxsize=1)(self._read_negative)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def prompts(self) -> list[str]:
        """All of them, read from disk each time."""
        return pyarrow.parquet.read_table(self.folder / PROMPTS, columns=["prompt"])["prompt"].to_pylist()

    @property
    def text_sizes(self) -> tuple[int, int]:
        """Widths of the text encoder's states and of its pooled embedding."""
        return self._states.shape[-1], self._pooled.shape[-1]

    def condition(self, rows: torch.Tensor, device: torch.device | str) -> TextCondition:
        """Of these prompts (B,)."""
        device, batch_size = torch.device(device), len(rows)
        states, pooled = self._read(self._rows[rows], device)
        null_states, null_pooled = self._negative(device)
        return TextCondition(
            states=states,
            pooled=pooled,
            micro_conditions=micro_conditions(self.image_size, batch_size, device),
            null_states=null_states.expand(batch_size, -1, -1),
            null_pooled=null_pooled.expand(batch_size, -1),
        )

    def _read_negative(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return self._read(torch.tensor([0]), device)  # it comes first

    def _read(self, rows: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """States (B, T, E) and pooled embeddings (B, P), float32, of rows (B,) of the M."""
        return to_device(self._states[rows], device).float(), to_device(self._pooled[rows], device).float()


@torch.no_grad()
def write_prompt_cache(
    parent: Path,
    text_encoder: CLIPTextModelWithProjection,
    text_tokenizer: CLIPTokenizer,
    prompts: Sequence[str],
    negative_prompt: str = "",
    *,
    batch_size: int = 256,
    shard_size: int = 1024,
) -> Path:
    """Encode prompts, in half precision, those that occur many times once; returns their folder, `parent / key`.

    Any number of processes, also of other runs, make its shards together. What is there already stays, so that an
    interruption costs the shards that were being made.
    """
    folder = parent / prompts_key(text_encoder, text_tokenizer, prompts, negative_prompt)
    distinct = list(dict.fromkeys([negative_prompt, *prompts]))
    shards = shards_of(folder / "encoded.safetensors", len(distinct), shard_size)
    with progress_bar(total=len(distinct), desc="prompts", unit="prompt") as progress:
        for path in each_once(shards):
            rows = shards[path]
            progress.update(rows.start - progress.n)  # those before are made, or others are at them
            states, pooled = [], []
            for start in rows[::batch_size]:
                part = distinct[start : min(start + batch_size, rows.stop)]
                encoded = encode_prompts(text_encoder, text_tokenizer, part)
                states.append(encoded[0].half().cpu())
                pooled.append(encoded[1].half().cpu())
                progress.update(len(part))
            with new_file(path) as staging:
                save_file({"states": torch.cat(states), "pooled": torch.cat(pooled)}, staging)
    for path in each_once([folder / PROMPTS]):
        row = {prompt: row for row, prompt in enumerate(distinct)}
        table = pyarrow.table({"prompt": list(prompts), "row": [row[prompt] for prompt in prompts]})
        with new_file(path) as staging:
            pyarrow.parquet.write_table(table, staging)
    return folder


def prompts_key(
    text_encoder: CLIPTextModelWithProjection,
    text_tokenizer: CLIPTokenizer,
    prompts: Sequence[str],
    negative_prompt: str,
) -> str:
    """The first 16 digits of a SHA-256 of all that the encodings depend on."""
    found = hashlib.sha256(weights_digest(text_encoder).encode())
    settings = {key: value for key, value in text_encoder.config.to_dict().items() if key not in OF_THE_FILE}
    words = json.loads(text_tokenizer.backend_tokenizer.to_str())["model"]  # the vocabulary, and how it is put together
    special = text_tokenizer.model_max_length, text_tokenizer.pad_token_id
    for part in (settings, words, special, negative_prompt, *prompts):
        found.update(json.dumps(part, sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()[:16]
