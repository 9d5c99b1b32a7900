"""Captioned pictures, and a tiny CLIP that has learnt them."""

import datasets
import numpy as np
import PIL.Image
import pytest

from distill.config import load_config
from distill.jobs.clip import CLIPJob, train_clip
from eval.monitor import RetrievalMonitor

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "grey": (128, 128, 128)}
SHAPES = ("square", "bar", "frame", "cross")


def picture(colour, shape, shade):
    pixels = np.full((16, 16, 3), 255, dtype=np.uint8)
    region = {
        "square": (slice(4, 12), slice(4, 12)), "bar": (slice(6, 10), slice(0, 16)),
        "frame": (slice(1, 15), slice(1, 15)), "cross": (slice(0, 16), slice(6, 10)),
    }[shape]  # fmt: skip
    pixels[region] = np.clip(np.array(COLOURS[colour]) + shade, 0, 255)
    return PIL.Image.fromarray(pixels)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of captioned 16x16 pictures: four colours, four shapes, 12 shades."""
    rows = [(colour, shape, shade) for colour in COLOURS for shape in SHAPES for shade in range(-30, 30, 5)]
    columns = {"image": [picture(*row) for row in rows], "text": [f"a {row[0]} {row[1]}" for row in rows]}
    folder = tmp_path_factory.mktemp("pictures")
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture(scope="session")
def clip_folder(pictures, tmp_path_factory):
    output = tmp_path_factory.mktemp("clip") / "run"
    job = load_config(
        CLIPJob,
        overrides=[
            f"data.name={pictures}", f"monitor.name={pictures}", f"output={output}", "network.hidden_size=32",
            "network.num_layers=2", "network.patch_size=4", "network.projection_size=16", "network.num_text_tokens=8",
            "network.dropout=0", "shift=1", "training.num_steps=120", "training.batch_size=48",
            "training.learning_rate=2e-3", "training.ema_decay=0.9", "training.tracker=none", "training.warmup_steps=5",
        ],
    )  # fmt: skip
    assert train_clip(job, RetrievalMonitor(job.monitor))
    return output / "clip"
