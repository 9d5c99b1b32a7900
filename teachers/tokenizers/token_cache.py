"""The tokens of a data set, computed once and kept as safetensors shards beside their tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import load_file, save_file

from teachers.component import weights_digest
from teachers.data import DataConfig, ImageData
from teachers.folder import new_file, new_folder
from teachers.progress import progress_bar
from teachers.randomness import to_device
from teachers.shards import MappedRows, shards_of
from teachers.sharing import each_once
from teachers.sources.dataset import open_dataset
from teachers.tokenizers.patch import PatchTokenizer
from teachers.tokenizers.vq import VQTokenizer, use_of_counts

INDEX, SOURCE = "index.json", "source.json"
CAPTIONS, SPLIT, CAPTION = "captions", "train", "text"  # a folder as `open_dataset` reads it
TOKENIZERS = {"PatchTokenizer": PatchTokenizer, "VQTokenizer": VQTokenizer}


@dataclass(frozen=True)
class TokenCache:
    """Tokens (N, L), class labels (N,) and captions of a data set, its class names, and the tokens' tokenizer.

    Tokens are any integers, and either in memory or on disk: `tokens[rows]` are those of rows (B,).
    """

    tokens: torch.Tensor | MappedRows
    labels: torch.Tensor
    class_names: list[str]
    texts: Sequence[str] | None
    tokenizer: PatchTokenizer | VQTokenizer


def load_tokenizer(folder: Path) -> PatchTokenizer | VQTokenizer:
    """The tokenizer of a folder, whichever it is; FileNotFoundError or ValueError if there is none."""
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"there is no tokenizer in {folder}: it has no config.json")
    name = json.loads(config.read_text()).get("_class_name")
    if name not in TOKENIZERS:
        raise ValueError(f"{folder} holds a {name}; expected {' or '.join(TOKENIZERS)}")
    return TOKENIZERS[name].from_pretrained(folder).eval()


@torch.no_grad()
def write_token_cache(
    folder: Path,
    tokenizer: PatchTokenizer | VQTokenizer,
    config: DataConfig,
    data: ImageData,
    *,
    batch_size: int = 256,
    shard_size: int = 65_536,
    num_workers: int = 0,
) -> tuple[float, float]:
    """Encode all images into shards; returns the codebook's use and perplexity over them.

    Any number of processes make the shards together, each with `num_workers` that read its images. After an
    interruption the whole shards are kept and the rest is added; a folder for other images is a ValueError.
    """
    _claim(folder, tokenizer, config, data, shard_size)
    shards = shards_of(folder / "tokens.safetensors", len(data), shard_size)
    dtype = torch.uint16 if tokenizer.codebook_size <= 2**16 else torch.int32
    with progress_bar(total=len(data), desc="tokens", unit="image") as progress:
        for path in each_once(shards):
            part, tokens = data.subset(shards[path]), []
            progress.update(shards[path].start - progress.n)  # those before are made, or others are at them
            for images in part.batches(batch_size, num_workers=num_workers):
                tokens.append(tokenizer.encode(to_device(images, tokenizer.device)).cpu().to(dtype))
                progress.update(len(images))
            with new_file(path) as staging:
                save_file({"tokens": torch.cat(tokens), "labels": part.labels}, staging)
    if data.texts is not None:
        captions = shards_of(folder / CAPTIONS / f"{SPLIT}.parquet", len(data), shard_size)
        for path in each_once(captions):
            with new_file(path) as staging:
                table = pyarrow.table({CAPTION: data.subset(captions[path]).texts})
                pyarrow.parquet.write_table(table, staging)
    for path in each_once([folder / INDEX]):
        index = {"shards": [shard.name for shard in shards], "class_names": data.class_names}
        with new_file(path) as staging:
            staging.write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
    return _codebook_use(shards, tokenizer.codebook_size)


def _claim(
    folder: Path, tokenizer: PatchTokenizer | VQTokenizer, config: DataConfig, data: ImageData, shard_size: int
) -> None:
    """Say in the folder what it is for; a ValueError where it is for something else."""
    source: dict[str, Any] = {
        "data": asdict(config),
        "num_images": len(data),
        "fingerprint": data.fingerprint,
        "shard_size": shard_size,
        "weights": weights_digest(tokenizer),
    }
    found = [path for path in folder.glob("*") if not path.name.startswith(".")]
    if found and not (folder / SOURCE).is_file():
        raise ValueError(f"the output folder {folder} is not empty; name another one or remove it")
    for path in each_once([folder / SOURCE]):
        with new_file(path) as staging:
            staging.write_text(json.dumps(source))
    known = json.loads((folder / SOURCE).read_text())
    # What folders of earlier versions do not say is taken on trust; settings that they lack were the usual ones.
    if isinstance(known["weights"], float):
        known["weights"] = source["weights"]
    if "fingerprint" not in known and not (folder / INDEX).is_file():
        _check_labels(folder, data, known["shard_size"])
    known = {"fingerprint": source["fingerprint"], **known, "data": asdict(DataConfig()) | known["data"]}
    if known != source:
        raise ValueError(
            f"{folder} holds tokens of other images, or of files that have changed since, or of another tokenizer; "
            "name another folder"
        )
    for path in each_once([folder / "tokenizer"]):
        with new_folder(path, shared=True) as staging:
            tokenizer.save_pretrained(staging)


def _check_labels(folder: Path, data: ImageData, shard_size: int) -> None:
    """A ValueError where shards of an earlier version, which sorted classes as text, have other labels than now."""
    for path, rows in shards_of(folder / "tokens.safetensors", len(data), shard_size).items():
        if path.is_file() and not torch.equal(load_file(path)["labels"], data.labels[rows.start : rows.stop]):
            raise ValueError(f"{folder} was begun with other numbers of the classes than now; name another folder")


def _codebook_use(shards: Iterable[Path], codebook_size: int) -> tuple[float, float]:
    """`codebook_use` of one shard after another."""
    counts = torch.zeros(codebook_size, dtype=torch.int64)
    for path in shards:
        counts += load_file(path)["tokens"].flatten().int().bincount(minlength=codebook_size)
    return use_of_counts(counts)


def load_token_cache(folder: Path) -> TokenCache:
    """What `write_token_cache` wrote; FileNotFoundError if it is not there or not complete."""
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"there are no (complete) tokens in {folder}; write them with scripts/cache_tokens.py --output {folder}"
        )
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    shards = [folder / name for name in index["shards"]]
    texts = index.get("texts")  # where captions were before they had files of their own
    if (folder / CAPTIONS).is_dir():
        texts = open_dataset(str(folder / CAPTIONS), SPLIT)[CAPTION]
    return TokenCache(
        tokens=MappedRows(shards, "tokens"),
        labels=torch.cat([load_file(shard)["labels"] for shard in shards]),
        class_names=index["class_names"],
        texts=texts,
        tokenizer=load_tokenizer(folder / "tokenizer"),
    )
