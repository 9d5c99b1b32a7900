"""The job that trains a teacher: tokenizer, masked diffusion training, a pipeline folder at the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from distill.batches import ShuffledRows
from distill.config import section, setting, to_yaml
from distill.trainer import Trainer, TrainingConfig, claim_output, make_accelerator
from teachers.condition import ClassCondition, Condition
from teachers.corruption import MASK_SCHEDULES
from teachers.data import DataConfig, ImageData, load_data
from teachers.network import MaskGITTransformer
from teachers.objective import MaskedDiffusionObjective
from teachers.pipeline import MaskedDiffusionPipeline
from teachers.randomness import derive_seed
from teachers.samplers.maskgit import ORDERS, MaskGITSampler
from teachers.token_cache import TokenCache, load_token_cache
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
    choice_temperature: float = setting(4.5, "Gumbel noise on the confidence, fading out over the steps")

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"sampler.order={self.order!r}; choose from {', '.join(ORDERS)}")


@dataclass
class TeacherJob:
    """Train a masked diffusion teacher."""

    output: str = setting("runs/teacher", "folder of the run; the pipeline is written to OUTPUT/pipeline")
    data: DataConfig = section(DataConfig, "the images")
    tokens: str = setting("", "folder of scripts/cache_tokens.py; empty: a patch tokenizer is fitted to the images")
    tokenizer: TokenizerConfig = section(TokenizerConfig, "how images become tokens")
    network: NetworkConfig = section(NetworkConfig, "the denoiser")
    objective: ObjectiveConfig = section(ObjectiveConfig, "what it learns")
    sampler: SamplerConfig = section(SamplerConfig, "how it generates")
    training: TrainingConfig = section(TrainingConfig, "the loop")


Monitor = Callable[[MaskedDiffusionPipeline, int], dict[str, float]]


def train_teacher(job: TeacherJob, monitor: Monitor | None = None) -> bool:
    """Run the job; `monitor(pipeline, step)` measures the averaged weights now and then. False if interrupted."""
    output = Path(job.output)
    data = load_token_cache(Path(job.tokens)) if job.tokens else load_data(job.data)
    if not data.class_names:
        raise ValueError("the teacher is class-conditional; name the column with the labels (data.label_column)")
    accelerator = make_accelerator(job.training, output)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            claim_output(output, job.training.resume)
            (output / "config.yaml").write_text(to_yaml(job))
        if isinstance(data, ImageData):
            data = tokenise(job, data, output / "tokenizer")
    tokenizer = data.tokenizer
    torch.manual_seed(derive_seed(job.training.seed, "denoiser"))
    denoiser = MaskGITTransformer(
        tokenizer.codebook_size, len(data.class_names), tokenizer.token_grid, **asdict(job.network)
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
        draw_batch=TokenBatches(data.tokens, data.labels, job.training, accelerator.device),
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


def tokenise(job: TeacherJob, data: ImageData, folder: Path) -> TokenCache:
    """The tokens of images, by the patch tokenizer in the folder or one that is fitted and put there."""
    images = data.images()
    if not folder.exists():  # k-means may not repeat itself to the bit
        tokenizer = PatchTokenizer.fit(images, seed=job.training.seed, **asdict(job.tokenizer))
        tokenizer.save_pretrained(folder)
    tokenizer = PatchTokenizer.from_pretrained(folder)
    return TokenCache(tokenizer.encode(images), data.labels, data.class_names, tokenizer)


class TokenBatches:
    """Batches of a tokenised data set; a pure function of seed, step and places."""

    def __init__(self, tokens: torch.Tensor, labels: torch.Tensor, config: TrainingConfig, device: torch.device):
        self.tokens, self.labels, self.device = tokens, labels, device
        self.rows = ShuffledRows(len(tokens), config.batch_size, config.seed)

    def __call__(self, step: int, places: range, generator: list[torch.Generator]) -> tuple[torch.Tensor, Condition]:
        rows = self.rows(step, places)
        return self.tokens[rows].long().to(self.device), ClassCondition(self.labels[rows].to(self.device))
