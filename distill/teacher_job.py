"""The job that trains a teacher: tokenizer, masked diffusion training, a pipeline folder at the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

from distill.config import section, setting, to_yaml
from distill.trainer import Trainer, TrainingConfig, claim_output, make_accelerator
from teachers.condition import Condition
from teachers.corruption import MASK_SCHEDULES
from teachers.data import DataConfig, load_data
from teachers.network import MaskGITTransformer
from teachers.objective import MaskedDiffusionObjective
from teachers.pipeline import MaskedDiffusionPipeline
from teachers.randomness import derive_seed
from teachers.sampler import ORDERS, MaskGITSampler
from teachers.tokenizer import PatchTokenizer


@dataclass
class TokenizerConfig:
    """The patch tokenizer."""

    patch_size: int = setting(2, "side of a patch in pixels; 1 makes single pixels the tokens")
    codebook_size: int = setting(128, "number of tokens, found by k-means")


@dataclass
class NetworkConfig:
    """The MaskGIT transformer."""

    hidden_size: int = setting(64, "width")
    num_layers: int = setting(3, "blocks")
    num_attention_heads: int = setting(4, "attention heads")
    mlp_size: int = setting(256, "width of the feed-forward layers")
    dropout: float = setting(0.0, "dropout while the teacher is trained")


@dataclass
class ObjectiveConfig:
    """The masked diffusion objective."""

    mask_schedule: str = setting("arccos", "how the mask ratio is drawn: arccos, cosine, linear, square")
    label_dropout: float = setting(0.1, "share of samples trained without their label, for guidance")
    label_smoothing: float = setting(0.0, "of the cross-entropy")

    def __post_init__(self) -> None:
        if self.mask_schedule not in MASK_SCHEDULES:
            raise ValueError(f"objective.mask_schedule={self.mask_schedule!r}; choose from {', '.join(MASK_SCHEDULES)}")
        for name in ("label_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"objective.{name}={getattr(self, name)} must be in [0, 1]")


@dataclass
class SamplerConfig:
    """The default sampler that is saved with the teacher."""

    num_inference_steps: int = setting(16, "network calls")
    schedule: str = setting("arccos", "share still masked after each step: arccos, cosine, linear, square")
    order: str = setting("confidence", "which tokens are kept at each step: the most confident, or random ones")
    choice_temperature: float = setting(4.5, "Gumbel noise on the confidence")
    temperature: float = setting(1.0, "of the tokens")
    guidance_scale: float = setting(1.0, "u + s (c - u); 1 is no guidance")
    guidance_ramp: str = setting("constant", "constant, or linear over the steps")

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"sampler.order={self.order!r}; choose from {', '.join(ORDERS)}")


@dataclass
class TeacherJob:
    """Train a masked diffusion teacher."""

    output: str = setting("runs/teacher", "folder of the run; the pipeline is written to OUTPUT/pipeline")
    data: DataConfig = section(DataConfig, "the images")
    tokenizer: TokenizerConfig = section(TokenizerConfig, "how images become tokens")
    network: NetworkConfig = section(NetworkConfig, "the denoiser")
    objective: ObjectiveConfig = section(ObjectiveConfig, "what it learns")
    sampler: SamplerConfig = section(SamplerConfig, "how it generates")
    training: TrainingConfig = section(TrainingConfig, "the loop")


Monitor = Callable[[MaskedDiffusionPipeline, int], dict[str, float]]


def train_teacher(job: TeacherJob, monitor: Monitor | None = None) -> bool:
    """Run the job; `monitor(pipeline, step)` measures the averaged weights now and then. False if interrupted."""
    output = Path(job.output)
    data = load_data(job.data)
    if data.num_classes == 0:
        raise ValueError("the teacher is class-conditional; name the column with the labels (data.label_column)")
    accelerator = make_accelerator(job.training, output)
    images = data.images()
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            claim_output(output, job.training.resume)
            (output / "config.yaml").write_text(to_yaml(job))
            if not (output / "tokenizer").exists():  # k-means may not repeat itself to the bit
                fit_tokenizer(job, images).save_pretrained(output / "tokenizer")
    tokenizer = PatchTokenizer.from_pretrained(output / "tokenizer")
    torch.manual_seed(derive_seed(job.training.seed, "denoiser"))
    denoiser = MaskGITTransformer(
        tokenizer.codebook_size, data.num_classes, tokenizer.token_grid, **asdict(job.network)
    )
    sampler = MaskGITSampler(**asdict(job.sampler))

    def pipeline(network: MaskGITTransformer) -> MaskedDiffusionPipeline:
        pipeline = MaskedDiffusionPipeline(network, tokenizer, sampler)
        return pipeline.to(accelerator.device)

    trainer = Trainer(
        job.training,
        accelerator,
        MaskedDiffusionObjective(denoiser.mask_token_id, **asdict(job.objective)),
        networks={"denoiser": denoiser.train()},
        learning_rates={"denoiser": job.training.learning_rate},
        averaged="denoiser",
        draw_batch=TokenBatches(tokenizer.encode(images), data.labels, job.training, accelerator.device),
        output=output,
        evaluate=None if monitor is None else lambda network, step: monitor(pipeline(network), step),
        run_settings=asdict(job.network) | {"batch_size": job.training.batch_size},
    )
    finished = trainer.train()
    if finished and accelerator.is_main_process:
        pipeline(trainer.averaged_network()).save_pretrained(output / "pipeline")
        names = json.dumps(data.class_names, ensure_ascii=False)
        (output / "pipeline" / "class_names.json").write_text(names)
    return finished


def fit_tokenizer(job: TeacherJob, images: torch.Tensor) -> PatchTokenizer:
    """The tokenizer that the job describes, fitted to images (N, C, H, W)."""
    settings = asdict(job.tokenizer)
    return PatchTokenizer.fit(images, seed=job.training.seed, **settings)


class TokenBatches:
    """Batches of a tokenised data set, shuffled anew in every epoch; a pure function of seed, step and places."""

    def __init__(self, tokens: torch.Tensor, labels: torch.Tensor, config: TrainingConfig, device: torch.device):
        self.tokens, self.labels, self.device = tokens, labels, device
        self.seed, self.batch_size = config.seed, config.batch_size
        self._order = lru_cache(maxsize=2)(self._order_of_epoch)

    def _order_of_epoch(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
        return torch.randperm(len(self.tokens), generator=generator)

    def __call__(self, step: int, places: range, generator: list[torch.Generator]) -> tuple[torch.Tensor, Condition]:
        positions = [divmod(step * self.batch_size + place, len(self.tokens)) for place in places]
        rows = torch.stack([self._order(epoch)[offset] for epoch, offset in positions])
        return self.tokens[rows].to(self.device), Condition(self.labels[rows].to(self.device))
