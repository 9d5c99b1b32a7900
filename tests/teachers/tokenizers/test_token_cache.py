import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from teachers import PatchTokenizer
from teachers.data import DataConfig, load_data
from teachers.tokenizers.token_cache import load_token_cache, write_token_cache
from teachers.tokenizers.vq import codebook_use

DIGITS = DataConfig(split="test")
CAPTIONED = {"text_column": "caption", "num_channels": 1}


@pytest.fixture
def tokenizer(digits):
    return PatchTokenizer.fit(digits, patch_size=2, codebook_size=16)


@pytest.fixture
def captioned(tmp_path):
    """Ten grey 8x8 images with labels and captions, one of two lines."""
    shades = np.random.default_rng(0).integers(0, 256, (10, 8, 8), dtype=np.uint8)
    columns = {"image": list(map(PIL.Image.fromarray, shades)), "label": [0, 1] * 5}
    columns["caption"] = [f"number {i}" for i in range(9)] + ["two\nlines"]
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "train.parquet")
    return DataConfig(name=str(tmp_path / "train.parquet"), **CAPTIONED)


def everything(cache):
    return cache.tokens[torch.arange(len(cache.tokens))].long()


class Counting:
    """A tokenizer that counts the images it encodes, stops at one of them, and meets others before the first."""

    def __init__(self, tokenizer, last=None, meeting=None):
        self.tokenizer, self.last, self.meeting, self.num_encoded = tokenizer, last, meeting, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode(self, images):
        if self.last is not None and self.num_encoded >= self.last:
            raise KeyboardInterrupt
        if self.meeting is not None and self.num_encoded == 0:
            self.meeting.wait(timeout=60)
        self.num_encoded += len(images)
        return self.tokenizer.encode(images)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_cache_holds_what_the_tokenizer_says(tokenizer, tmp_path, num_workers):
    data = load_data(DIGITS)
    used, perplexity = write_token_cache(
        tmp_path / "tokens", tokenizer, DIGITS, data, shard_size=100, num_workers=num_workers
    )
    cache = load_token_cache(tmp_path / "tokens")
    shards = [load_file(path)["tokens"] for path in (tmp_path / "tokens").glob("*.safetensors")]
    assert {(shard.dtype, shard.shape[1]) for shard in shards} == {(torch.uint16, 16)}
    assert len(shards) == 3
    assert torch.equal(everything(cache), tokenizer.encode(data.images()))
    assert torch.equal(cache.labels, data.labels)
    assert (cache.class_names, cache.texts) == (data.class_names, None)
    assert torch.equal(cache.tokenizer.codebook, tokenizer.codebook)
    assert (used, perplexity) == codebook_use(everything(cache), 16)


def test_tokens_of_a_large_codebook_have_room(digits, tmp_path):
    large = PatchTokenizer((8, 8), 1, 2, 2**16 + 1)
    large.codebook[:-1] = 9  # further from any patch than the last entry
    write_token_cache(tmp_path / "tokens", large, DIGITS, load_data(DIGITS).subset(range(3)))
    assert (everything(load_token_cache(tmp_path / "tokens")) == 2**16).all()


def test_captions_come_back_as_they_were(tokenizer, captioned, tmp_path):
    data = load_data(captioned)
    write_token_cache(tmp_path / "tokens", tokenizer, captioned, data, shard_size=4)
    cache = load_token_cache(tmp_path / "tokens")
    assert cache.texts == data.texts
    assert (len(cache.texts), cache.texts[9]) == (10, "two\nlines")


def test_a_folder_of_the_time_of_one_list_of_captions_opens(tokenizer, captioned, tmp_path):
    data, folder = load_data(captioned), tmp_path / "tokens"
    tokens = tokenizer.encode(data.images())
    folder.mkdir()
    for number, rows in enumerate([slice(0, 6), slice(6, 10)]):
        shard = {"tokens": tokens[rows].int(), "labels": data.labels[rows]}
        save_file(shard, folder / f"tokens-{number:05d}-of-00002.safetensors")
    shards = [path.name for path in sorted(folder.iterdir())]
    tokenizer.save_pretrained(folder / "tokenizer")
    index = {"shards": shards, "class_names": data.class_names, "texts": list(data.texts)}
    (folder / "index.json").write_text(json.dumps(index))
    cache = load_token_cache(folder)
    assert torch.equal(everything(cache), tokens)
    assert torch.equal(cache.labels, data.labels)
    assert cache.texts == list(data.texts)


def test_an_interrupted_cache_goes_on(tokenizer, captioned, tmp_path):
    data, folder = load_data(captioned), tmp_path / "tokens"
    with pytest.raises(KeyboardInterrupt):
        write_token_cache(folder, Counting(tokenizer, last=7), captioned, data, shard_size=4, batch_size=1)
    with pytest.raises(FileNotFoundError, match="complete"):
        load_token_cache(folder)
    going_on = Counting(tokenizer)
    use = write_token_cache(folder, going_on, captioned, data, shard_size=4)
    assert going_on.num_encoded == 6  # the first four were whole
    assert torch.equal(everything(load_token_cache(folder)), tokenizer.encode(data.images()))
    again = Counting(tokenizer)
    assert write_token_cache(folder, again, captioned, data, shard_size=4) == use
    assert again.num_encoded == 0


def test_processes_share_the_images(tokenizer, tmp_path):
    """Threads in their place: locks are of open files, not of processes."""
    data, meeting = load_data(DIGITS), Barrier(3)
    workers = [Counting(tokenizer, meeting=meeting) for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        uses = pool.map(
            lambda worker: write_token_cache(tmp_path / "tokens", worker, DIGITS, data, shard_size=10), workers
        )
        assert len(set(uses)) == 1
    assert sum(worker.num_encoded for worker in workers) == len(data)
    assert all(worker.num_encoded > 0 for worker in workers)
    assert torch.equal(everything(load_token_cache(tmp_path / "tokens")), tokenizer.encode(data.images()))


def test_a_cache_is_not_mixed_with_another(tokenizer, tmp_path):
    write_token_cache(tmp_path / "tokens", tokenizer, DIGITS, load_data(DIGITS))
    with pytest.raises(ValueError, match="of other images"):
        write_token_cache(tmp_path / "tokens", tokenizer, DataConfig(), load_data(DataConfig()))
    tokenizer.codebook[0] += 1
    with pytest.raises(ValueError, match="of another tokenizer"):
        write_token_cache(tmp_path / "tokens", tokenizer, DIGITS, load_data(DIGITS))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").touch()
    with pytest.raises(ValueError, match="not empty"):
        write_token_cache(tmp_path / "other", tokenizer, DIGITS, load_data(DIGITS))
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["precious"]


def test_a_cache_of_files_that_have_changed_is_not_gone_on_with(tokenizer, captioned, tmp_path):
    folder = tmp_path / "tokens"
    write_token_cache(folder, tokenizer, captioned, load_data(captioned))
    again = Counting(tokenizer)
    write_token_cache(folder, again, captioned, load_data(captioned))
    assert again.num_encoded == 0
    rows = datasets.load_dataset("parquet", data_files=captioned.name, split="train")
    rows.select(range(9, -1, -1)).to_parquet(captioned.name)  # as many images of the same settings
    with pytest.raises(ValueError, match="changed since"):
        write_token_cache(folder, tokenizer, captioned, load_data(captioned))


def test_a_cache_of_before_there_were_fingerprints_is_taken_on_trust(tokenizer, tmp_path):
    folder, data = tmp_path / "tokens", load_data(DIGITS)
    write_token_cache(folder, tokenizer, DIGITS, data)
    source = json.loads((folder / "source.json").read_text())
    del source["fingerprint"], source["data"]["background"], source["data"]["drop_unlabelled"]
    (folder / "source.json").write_text(json.dumps(source))
    again = Counting(tokenizer)
    write_token_cache(folder, again, DIGITS, data)
    assert again.num_encoded == 0
    with pytest.raises(ValueError, match="of other images"):
        write_token_cache(folder, again, replace(DIGITS, background="black"), data)


def test_a_cache_begun_when_classes_were_sorted_as_text_is_not_gone_on_with(tokenizer, tmp_path):
    folder, data = tmp_path / "tokens", load_data(DIGITS)
    before = load_data(DIGITS, ["10", *"0123456789"])  # numbers one higher
    with pytest.raises(KeyboardInterrupt):
        write_token_cache(folder, Counting(tokenizer, last=200), DIGITS, before, shard_size=100, batch_size=50)
    source = json.loads((folder / "source.json").read_text())
    del source["fingerprint"]
    (folder / "source.json").write_text(json.dumps(source))
    with pytest.raises(ValueError, match="other numbers of the classes"):
        write_token_cache(folder, tokenizer, DIGITS, data, shard_size=100)
    write_token_cache(folder, tokenizer, DIGITS, before, shard_size=100)
    write_token_cache(folder, tokenizer, DIGITS, data, shard_size=100)  # nothing is left to do
    assert torch.equal(load_token_cache(folder).labels, data.labels + 1)
