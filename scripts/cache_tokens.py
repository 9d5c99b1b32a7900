"""Encode a data set once: safetensors shards of tokens for scripts/train_teacher.py.

    python scripts/cache_tokens.py --tokenizer runs/mnist/tokenizer/tokenizer --output runs/mnist/tokens \
        name=ylecun/mnist

An interrupted run goes on where it was. Many processes share the work: under `accelerate launch`, each on its GPU, or
started one by one on any machines that see the folder.
"""

import argparse
import json
from pathlib import Path

from distill.config import describe, load_config
from distill.jobs.command import run
from distill.loop.launch import run_processes
from eval.real import check_shape, image_shape
from eval.sampling import device_of, processes
from teachers.data import DataConfig, load_data
from teachers.tokenizers.token_cache import load_tokenizer, write_token_cache


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Encode a data set once.",
        epilog="settings of the data:\n" + describe(DataConfig()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--num-workers", type=int, default=0, help="that read images, for each process")
    parser.add_argument("--device", help="default: a GPU where there is one; each process its own")
    parser.add_argument("data", nargs="*", metavar="key=value", help="the images, e.g. name=folder image_size=256")
    arguments = parser.parse_intermixed_args()
    run_processes(lambda: run(lambda: cache(arguments)))


def cache(arguments: argparse.Namespace) -> None:
    device = device_of(arguments)
    tokenizer = load_tokenizer(arguments.tokenizer).to(device)
    num_channels, _, _ = shape = image_shape(tokenizer)
    config = load_config(DataConfig, overrides=[f"num_channels={num_channels}", *arguments.data])
    data = load_data(config)
    check_shape(data, shape, config.name)
    sizes = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers}
    used, perplexity = write_token_cache(arguments.output, tokenizer, config, data, **sizes)
    if not processes().is_main_process:
        return
    height, width = tokenizer.token_grid
    print(f"wrote {arguments.output}: {len(data)} images of {data.num_classes} classes as {height} x {width} tokens")
    result = {"num_images": len(data), "codebook_size": tokenizer.codebook_size, "codebook_used": used}
    print(json.dumps(result | {"perplexity": perplexity}))


if __name__ == "__main__":
    main()
