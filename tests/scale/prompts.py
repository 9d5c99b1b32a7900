"""Encode many prompts with a tiny text encoder, kill it half-way, go on, and read them in random order.

    OMP_NUM_THREADS=1 PYTHONPATH=.:tests:tests/scale python tests/scale/prompts.py FOLDER [--prompts 1000000]

A million take 430 MB of disk. The last line of stdout is the result as JSON.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from lives import life
from tiny_text import CAPTIONS, tiny_text_encoder
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from teachers.conditions.prompt_cache import PromptCache, write_prompt_cache
from teachers.conditions.prompts import PromptConfig, load_prompts

SHARD_SIZE = 4096


def make(folder: Path, num_prompts: int) -> None:
    """A text file of different prompts, and a text encoder with its tokenizer."""
    lines = (f"{CAPTIONS[number % len(CAPTIONS)]} {number}" for number in range(num_prompts))
    (folder / "prompts.txt").write_text("\n".join(lines))
    for part in tiny_text_encoder():
        part.save_pretrained(folder / "clip")


def encode(folder: Path) -> None:
    prompts = load_prompts(PromptConfig(name=str(folder / "prompts.txt")))
    text_encoder = CLIPTextModelWithProjection.from_pretrained(folder / "clip")
    text_tokenizer = CLIPTokenizer.from_pretrained(folder / "clip")
    write_prompt_cache(folder / "cache", text_encoder, text_tokenizer, prompts, shard_size=SHARD_SIZE)


def read(folder: Path) -> None:
    """Write down how long batches of 256 random prompts take."""
    (written,) = (folder / "cache").iterdir()
    start = time.perf_counter()
    cache = PromptCache(written, (8, 8))
    opened = time.perf_counter()
    for _ in range(1000):
        cache.condition(torch.randint(len(cache), (256,)), "cpu")
    seconds = time.perf_counter() - opened
    reading = {"prompts": len(cache), "opening_s": round(opened - start, 2), "batch_ms": round(seconds, 2)}
    (folder / "reading.json").write_text(json.dumps(reading))


def main() -> None:
    parser = argparse.ArgumentParser(description="Encode many prompts, with a kill half-way.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True)
    life(lambda: make(folder, arguments.prompts))

    def shards() -> set[Path]:
        return set((folder / "cache").glob("*/encoded-*.safetensors"))

    num_shards = -(-(arguments.prompts + 1) // SHARD_SIZE)
    result = {"killed_half_way": life(lambda: encode(folder), lambda: len(shards()) >= num_shards / 2)}
    kept = {path: path.stat().st_mtime_ns for path in shards()}
    result["gone_on"] = life(lambda: encode(folder))
    assert len(shards()) == num_shards
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    result["all_there"] = life(lambda: encode(folder))
    result["read"] = life(lambda: read(folder)) | json.loads((folder / "reading.json").read_text())
    print(json.dumps({"shards": num_shards, "kept": len(kept)} | result))


if __name__ == "__main__":
    main()
