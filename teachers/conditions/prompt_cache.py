"""Encoded prompts on disk, so that the text encoder need not stay in memory.

Shapes: N prompts, M different ones, T text tokens, E text width, P pooled width.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from teachers.component import weights_digest
from teachers.conditions.condition import TextCondition
from teachers.conditions.prompts import encode_prompts, micro_conditions
from teachers.folder import new_file
from teachers.progress import progress_bar

SOURCE = "source.json"


class PromptCache:
    """What `write_prompt_cache` wrote: the conditions of `prompts`, mapped from disk.

    Raises FileNotFoundError where it is not there or not complete.
    """

    def __init__(self, folder: Path, image_size: tuple[int, int]):
        if not (folder / SOURCE).is_file():
            raise FileNotFoundError(f"there are no (complete) encoded prompts in {folder}")
        self.image_size = image_size
        self.prompts: list[str] = json.loads((folder / SOURCE).read_text(encoding="utf-8"))["prompts"]
        self._rows = np.load(folder / "rows.npy")
        self._states = np.load(folder / "states.npy", mmap_mode="r")
        self._pooled = np.load(folder / "pooled.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def text_sizes(self) -> tuple[int, int]:
        """Widths of the text encoder's states and of its pooled embedding."""
        return self._states.shape[-1], self._pooled.shape[-1]

    def condition(self, rows: torch.Tensor, device: torch.device | str) -> TextCondition:
        """Of these prompts (B,)."""
        encoded = self._rows[rows.cpu().numpy()]
        null = np.zeros_like(encoded)  # the negative prompt comes first

        def read(array: np.ndarray, rows: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array[rows]).to(device).float()

        return TextCondition(
            states=read(self._states, encoded),
            pooled=read(self._pooled, encoded),
            micro_conditions=micro_conditions(self.image_size, len(encoded), device),
            null_states=read(self._states, null),
            null_pooled=read(self._pooled, null),
        )


def write_prompt_cache(
    folder: Path,
    text_encoder: CLIPTextModelWithProjection,
    text_tokenizer: CLIPTokenizer,
    prompts: list[str],
    negative_prompt: str = "",
    batch_size: int = 256,
) -> None:
    """Encode prompts into the folder, in half precision, those that occur many times once.

    What is there already stays; a folder with other prompts, or of another encoder, is a ValueError.
    """
    source = {"weights": weights_digest(text_encoder), "negative_prompt": negative_prompt, "prompts": prompts}
    if (folder / SOURCE).is_file():
        known = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
        if isinstance(known["weights"], float):  # of the time before digests: taken on trust
            known["weights"] = source["weights"]
        if known != source:
            raise ValueError(f"{folder} holds other prompts, or those of another encoder; name another folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    distinct = list(dict.fromkeys([negative_prompt, *prompts]))
    for start in progress_bar(range(0, len(distinct), batch_size), desc="prompts", unit="batch"):
        part = distinct[start : start + batch_size]
        for name, encoded in zip(("states", "pooled"), encode_prompts(text_encoder, text_tokenizer, part), strict=True):
            path, shape = folder / f"{name}.npy", (len(distinct), *encoded.shape[1:])
            if start == 0:
                np.lib.format.open_memmap(path, "w+", np.float16, shape)
            array = np.load(path, mmap_mode="r+")
            array[start : start + len(part)] = encoded.half().cpu().numpy()
            array.flush()
    row = {prompt: row for row, prompt in enumerate(distinct)}
    np.save(folder / "rows.npy", np.array([row[prompt] for prompt in prompts]))
    with new_file(folder / SOURCE) as staging:
        staging.write_text(json.dumps(source, ensure_ascii=False), encoding="utf-8")
