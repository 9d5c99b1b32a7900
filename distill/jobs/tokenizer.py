"""The job that trains a VQ tokenizer on the images of a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from distill.config import section, setting
from distill.jobs.run import note_saved, note_settings, open_run
from distill.jobs.sources import SOURCES, check_data, data_sources, note_sources
from distill.loop.batches import ShuffledRows
from distill.loop.checkpoint import has_checkpoints
from distill.loop.config import TrainingConfig
from distill.loop.host import by_main_process
from distill.loop.signals import Hopeless
from distill.loop.trainer import CHECKPOINTS, Trainer, on_main_process
from teachers.data import DataConfig, load_data
from teachers.folder import new_folder
from teachers.objectives.vq import VQConfig, VQObjective
from teachers.randomness import derive_seed, to_device
from teachers.tokenizers.vq import VQTokenizer


@dataclass
class VQNetworkConfig:
    """The convolutional network."""

    codebook_size: int = setting(256, "number of tokens")
    entry_size: int = setting(8, "numbers in an entry of the codebook; small ones are used more evenly")
    widths: tuple[int, ...] = setting((64, 128, 128), "channels at each level; each but the first halves the image")
    num_blocks: int = setting(1, "residual blocks per level")
    num_groups: int = setting(8, "of group normalisation; divides the widths")
    attention: bool = setting(False, "attention at the lowest resolution")
    local: bool = setting(False, "each token is of its own patch alone: for pictures with flat areas")

    def __post_init__(self) -> None:
        wrong = [width for width in self.widths if width % self.num_groups]
        if not self.widths or wrong:
            raise ValueError(
                f"network.widths={list(self.widths)} must all be multiples of num_groups={self.num_groups}"
            )
        if self.codebook_size < 2:
            raise ValueError(f"network.codebook_size={self.codebook_size} must be at least 2")


@dataclass
class TokenizerJob:
    """Train a VQ tokenizer."""

    output: str = setting("runs/tokenizer", "folder of the run; the tokenizer is written to OUTPUT/tokenizer")
    data: DataConfig = section(DataConfig, "the images")
    network: VQNetworkConfig = section(VQNetworkConfig, "the network")
    objective: VQConfig = section(VQConfig, "what it learns")
    training: TrainingConfig = section(TrainingConfig, "the loop")


Monitor = Callable[[VQTokenizer, int], dict[str, float]]


def train_tokenizer(job: TokenizerJob, monitor: Monitor) -> bool:
    """Run the job; `monitor(tokenizer, step)` measures the averaged weights now and then. False if interrupted.

    It must return the codebook's `perplexity`, and training ends as `Hopeless` if that is too low half-way.
    """
    data = load_data(job.data)
    accelerator, output = open_run(job, prepared=(SOURCES,))
    sources = data_sources(data)
    if has_checkpoints(output / CHECKPOINTS):
        by_main_process(lambda: check_data(output, sources, labels_are_saved=True))  # labels are nothing to it
    torch.manual_seed(derive_seed(job.training.seed, "tokenizer"))
    image, _ = data[0]
    tokenizer = make_tokenizer(job.network, image.shape).train()
    rows = ShuffledRows(len(data), job.training.batch_size, job.training.seed)

    def draw_batch(step: int, places: range, generators: list[torch.Generator]) -> tuple[torch.Tensor, int]:
        images = torch.stack([image for image, _ in data.__getitems__(rows(step, places).tolist())])
        return to_device(images, accelerator.device), step

    def evaluate(network: VQTokenizer, step: int) -> dict[str, float]:
        measures = monitor(network, step)
        if step >= job.training.num_steps / 2:
            check_codebook(measures["perplexity"], job)
        return measures

    trainer = Trainer(
        job.training,
        accelerator,
        VQObjective(job.objective, tokenizer, job.training.num_steps, job.training.seed, accelerator.gather),
        draw_batch=draw_batch,
        output=output,
        evaluate=on_main_process(evaluate),
        run_settings=asdict(job.objective) | {"batch_size": job.training.batch_size},
    )
    note_settings(job)
    by_main_process(lambda: note_sources(output, sources))
    finished = trainer.train()
    note_saved(job)
    network = trainer.averaged_network()
    accelerator.end_training()
    if finished and accelerator.is_main_process:
        with new_folder(output / "tokenizer", replaces=True) as folder:
            network.save_pretrained(folder)
    return finished


def make_tokenizer(config: VQNetworkConfig, image_shape: torch.Size) -> VQTokenizer:
    """An untrained tokenizer for images (C, H, W)."""
    num_channels, height, width = image_shape
    levels = len(config.widths)
    settings = {
        "in_channels": num_channels,
        "out_channels": num_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.num_blocks,
        "norm_num_groups": config.num_groups,
        "latent_channels": config.widths[-1],
        "num_vq_embeddings": config.codebook_size,
        "vq_embed_dim": config.entry_size,
        "mid_block_add_attention": config.attention,
    }
    return VQTokenizer((height, width), settings, local=config.local)


def check_codebook(perplexity: float, job: TokenizerJob) -> None:
    """Raise `Hopeless`, with advice, if the tokens of real images hardly vary."""
    lowest = job.objective.lowest_perplexity * job.network.codebook_size
    if perplexity < lowest:
        raise Hopeless(
            f"the codebook has collapsed: the perplexity of its {job.network.codebook_size} tokens is "
            f"{perplexity:.1f}, less than {lowest:.1f} (objective.lowest_perplexity). Try a smaller "
            "network.codebook_size or network.entry_size, a higher objective.reconstruction_weight or "
            "objective.revival_rate, or a lower training.learning_rate"
        )
