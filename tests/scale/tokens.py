"""Tokenise many small images from a parquet file, kill it half-way, go on, and read the tokens in random order.

    OMP_NUM_THREADS=1 HF_HOME=FOLDER-cache PYTHONPATH=.:tests/scale \
        python tests/scale/tokens.py FOLDER [--images 1000000] [--num-workers 0]

A million take 60 MB of disk, and 320 MB in the cache of `datasets`. The last line of stdout is the result as JSON.
"""

import argparse
import io
import json
import time
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import torch
from lives import life

from teachers.data import DataConfig, load_data
from teachers.tokenizers.patch import PatchTokenizer
from teachers.tokenizers.token_cache import load_token_cache, write_token_cache

NUM_DIFFERENT, PART = 1000, 50_000


def make_images(folder: Path, num_images: int) -> None:
    """A parquet file of images, labels and captions, and a tokenizer for them."""
    pictures = np.random.default_rng(0).integers(0, 256, (NUM_DIFFERENT, 8, 8), dtype=np.uint8)
    files = [io.BytesIO() for _ in pictures]
    for picture, file in zip(pictures, files, strict=True):
        PIL.Image.fromarray(picture).save(file, "PNG")
    cells = [{"bytes": file.getvalue(), "path": None} for file in files]
    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    schema = pyarrow.schema({"image": image, "label": pyarrow.int64(), "text": pyarrow.string()})
    with pyarrow.parquet.ParquetWriter(folder / "train.parquet", schema) as writer:
        for start in range(0, num_images, PART):
            numbers = range(start, min(start + PART, num_images))
            columns = [
                [cells[number % NUM_DIFFERENT] for number in numbers],
                [number % NUM_DIFFERENT for number in numbers],
                [f"picture {number}" for number in numbers],
            ]
            writer.write_table(pyarrow.table(columns, schema=schema))
    images = torch.from_numpy(pictures).unsqueeze(1) / 255
    PatchTokenizer.fit(images, patch_size=2, codebook_size=64).save_pretrained(folder / "tokenizer")


def encode(folder: Path, num_workers: int) -> None:
    config = DataConfig(name=str(folder / "train.parquet"), text_column="text")
    tokenizer = PatchTokenizer.from_pretrained(folder / "tokenizer")
    write_token_cache(folder / "tokens", tokenizer, config, load_data(config), num_workers=num_workers)


def read(folder: Path) -> None:
    """Write down how long batches of 256 random rows take."""
    start = time.perf_counter()
    cache = load_token_cache(folder / "tokens")
    opened = time.perf_counter()
    for _ in range(1000):
        cache.tokens[torch.randint(len(cache.tokens), (256,))].long()
    seconds = time.perf_counter() - opened
    first = torch.arange(NUM_DIFFERENT)  # of which the last ones are repetitions
    assert torch.equal(cache.tokens[first], cache.tokens[first + len(cache.tokens) - NUM_DIFFERENT])
    assert cache.texts is not None
    assert cache.texts[len(cache.tokens) - 1] == f"picture {len(cache.tokens) - 1}"
    reading = {"images": len(cache.tokens), "opening_s": round(opened - start, 2), "batch_ms": round(seconds, 2)}
    (folder / "reading.json").write_text(json.dumps(reading))


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokenise many images, with a kill half-way.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1_000_000, help="a multiple of 1,000")
    parser.add_argument("--num-workers", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True)
    life(lambda: make_images(folder, arguments.images))
    datasets.disable_progress_bars()

    def shards() -> set[Path]:
        return set((folder / "tokens").glob("tokens-*.safetensors"))

    def work() -> None:
        encode(folder, arguments.num_workers)

    num_shards = -(-arguments.images // 65_536)
    result = {"killed_half_way": life(work, lambda: len(shards()) >= num_shards / 2)}
    kept = {path: path.stat().st_mtime_ns for path in shards()}
    result["gone_on"] = life(work)
    assert len(shards()) == num_shards
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    result["all_there"] = life(work)
    result["read"] = life(lambda: read(folder)) | json.loads((folder / "reading.json").read_text())
    print(json.dumps({"shards": num_shards, "kept": len(kept)} | result))


if __name__ == "__main__":
    main()
