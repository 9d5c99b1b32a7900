"""The tokens of a data set, computed once and kept as safetensors shards beside their tokenizer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from teachers.component import weights_digest
from teachers.data import DataConfig, ImageData
from teachers.folder import new_file
from teachers.progress import progress_bar
from teachers.tokenizers.patch import PatchTokenizer
from teachers.tokenizers.vq import VQTokenizer, codebook_use

INDEX = "index.json"
TOKENIZERS = {"PatchTokenizer": PatchTokenizer, "VQTokenizer": VQTokenizer}


@dataclass(frozen=True)
class TokenCache:
    """Tokens (N, L) int32, class labels (N,) and captions of a data set, its class names, and the tokens' tokenizer."""

    tokens: torch.Tensor
    labels: torch.Tensor
    class_names: list[str]
    texts: list[str] | None
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
) -> tuple[float, float]:
    """Encode all images into shards; returns the codebook's use and perplexity over them.

    After an interruption the whole shards are kept and the rest is added; a folder for other images is a ValueError.
    """
    source = {
        "data": asdict(config),
        "num_images": len(data),
        "shard_size": shard_size,
        "weights": weights_digest(tokenizer),
    }
    origin = folder / "source.json"
    if origin.is_file():
        known = json.loads(origin.read_text())
        if isinstance(known["weights"], float):  # of the time before digests: taken on trust
            known["weights"] = source["weights"]
        if known != source:
            raise ValueError(f"{folder} holds tokens of other images or of another tokenizer; name another folder")
    if not origin.is_file() and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"the output folder {folder} is not empty; name another one or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    origin.write_text(json.dumps(source))
    tokenizer.save_pretrained(folder / "tokenizer")

    starts = range(0, len(data), shard_size)
    shards = []
    with progress_bar(total=len(data), desc="tokens", unit="image") as progress:
        for start in starts:
            rows = list(range(start, min(start + shard_size, len(data))))
            path = folder / f"tokens-{len(shards):05d}-of-{len(starts):05d}.safetensors"
            if not path.is_file():
                part = data.subset(rows)
                tokens = []
                for images in part.batches(batch_size):
                    tokens.append(tokenizer.encode(images.to(tokenizer.device)).int().cpu())
                    progress.update(len(images))
                with new_file(path) as staging:
                    save_file({"tokens": torch.cat(tokens), "labels": part.labels}, staging)
            else:
                progress.update(len(rows))
            shards.append(path.name)
    index = {"shards": shards, "class_names": data.class_names, "texts": data.texts}
    (folder / INDEX).write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
    tokens = torch.cat([load_file(folder / name)["tokens"] for name in shards])
    return codebook_use(tokens, tokenizer.codebook_size)


def load_token_cache(folder: Path) -> TokenCache:
    """What `write_token_cache` wrote; FileNotFoundError if it is not there or not complete."""
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"there are no (complete) tokens in {folder}; write them with scripts/cache_tokens.py --output {folder}"
        )
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    shards = [load_file(folder / name) for name in index["shards"]]
    return TokenCache(
        tokens=torch.cat([shard["tokens"] for shard in shards]),
        labels=torch.cat([shard["labels"] for shard in shards]),
        class_names=index["class_names"],
        texts=index.get("texts"),
        tokenizer=load_tokenizer(folder / "tokenizer"),
    )
