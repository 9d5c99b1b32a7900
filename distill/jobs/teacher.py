"""The job that trains a teacher: tokenizer, masked diffusion training, a pipeline folder at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from distill.config import choice, section, setting
from distill.jobs.run import note_saved, note_settings, open_run
from distill.jobs.sources import SOURCES, check_data, data_sources, note_sources
from distill.loop.batches import ShuffledRows
from distill.loop.checkpoint import has_checkpoints
from distill.loop.config import TrainingConfig
from distill.loop.host import by_main_process
from distill.loop.trainer import CHECKPOINTS, Trainer
from teachers.conditions.condition import ClassLabels, Condition, Conditions
from teachers.conditions.prompt_cache import PromptCache, write_prompt_cache
from teachers.data import DataConfig, ImageData, load_data
from teachers.denoiser import Denoiser
from teachers.folder import new_folder
from teachers.networks.amused import AmusedDenoiser
from teachers.networks.maskgit import MaskGITTransformer
from teachers.networks.recompute import recompute_activations
from teachers.objectives import OBJECTIVES
from teachers.pipeline import MaskedDiffusionPipeline, all_classes
from teachers.randomness import derive_seed, to_device
from teachers.samplers.maskgit import ORDERS, MaskGITSampler
from teachers.shards import MappedRows
from teachers.sharing import each_once
from teachers.tokenizers.patch import PatchTokenizer
from teachers.tokenizers.token_cache import TokenCache, load_token_cache

TOKENIZER = "tokenizer"  # in the folder of a run: the patch tokenizer that was fitted to its images


@dataclass
class TokenizerConfig:
    """The patch tokenizer."""

    patch_size: int = setting(2, "side of a patch in pixels; 1 makes single pixels the tokens")
    codebook_size: int = setting(128, "number of tokens, found by k-means")


@dataclass
class NetworkConfig:
    """The transformer: aMUSEd's for text, MaskGIT's for all else."""

    hidden_size: int = setting(64, "width")
    num_layers: int = setting(3, "blocks")
    num_res_blocks: int = setting(1, "aMUSEd's convolution blocks before the transformer, and after it")
    num_attention_heads: int = setting(4, "attention heads")
    mlp_size: int = setting(256, "width of the feed-forward layers")
    dropout: float = setting(0.0, "dropout while the teacher is trained")


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
    text_encoder: str = setting("", "CLIP (folder or hub id) of a teacher conditioned on captions; empty: on labels")
    tokenizer: TokenizerConfig = section(TokenizerConfig, "how images become tokens")
    network: NetworkConfig = section(NetworkConfig, "the denoiser")
    objective: Any = choice(OBJECTIVES, "masked", "what it learns")
    sampler: SamplerConfig = section(SamplerConfig, "how it generates")
    training: TrainingConfig = section(TrainingConfig, "the loop")
    scoring_clip: str = setting("", "CLIP (folder or hub id) that measures samples of captions during training")


Monitor = Callable[[MaskedDiffusionPipeline, Conditions, int, Callable[[], None]], dict[str, float]]


def train_teacher(job: TeacherJob, monitor: Monitor | None = None) -> bool:
    """Run the job; `monitor(pipeline, conditions, step, heartbeat)` measures the averaged weights now and then.

    False if interrupted.
    """
    data = load_token_cache(Path(job.tokens)) if job.tokens else load_data(job.data)
    check_columns(job, data)
    accelerator, output = open_run(job, prepared=(TOKENIZER, SOURCES))
    sources = data_sources(data)
    if isinstance(data, ImageData):
        data = tokenise(job, data, output / TOKENIZER)
    conditions: Conditions = ClassLabels(data.labels)
    if job.text_encoder:
        conditions = encoded = encode_captions(job, data, output.parent / "prompts", accelerator.device)
        sources["captions"] = encoded.folder.name
    if has_checkpoints(output / CHECKPOINTS):
        by_main_process(lambda: check_data(output, sources, labels_are_saved=bool(job.tokens)))
    tokenizer = data.tokenizer
    torch.manual_seed(derive_seed(job.training.seed, "denoiser"))
    denoiser = make_denoiser(job, data, conditions)
    if job.training.gradient_checkpointing:
        recompute_activations(denoiser.layers)
    if job.training.compile:
        denoiser.compile_repeated_blocks()
    sampler = MaskGITSampler(**asdict(job.sampler))

    def pipeline(network: Denoiser, text_encoder=None, text_tokenizer=None) -> MaskedDiffusionPipeline:
        names = None if job.text_encoder else data.class_names
        parts = network, tokenizer, sampler, text_encoder, text_tokenizer
        return MaskedDiffusionPipeline(*parts, class_names=names).to(accelerator.device)

    def evaluate(network: Denoiser, step: int, heartbeat: Callable[[], None]) -> dict[str, float]:
        assert monitor is not None
        teacher = pipeline(network)
        return monitor(teacher, conditions if job.text_encoder else all_classes(teacher), step, heartbeat)

    trainer = Trainer(
        job.training,
        accelerator,
        OBJECTIVES[job.objective.name](job.objective, denoiser.train()),
        draw_batch=TokenBatches(data.tokens, conditions, job.training, accelerator.device),
        output=output,
        evaluate=evaluate if monitor is not None else None,
        sequence_length=data.tokens.shape[1],
        run_settings=asdict(job.network) | {"batch_size": job.training.batch_size},
    )
    note_settings(job)
    by_main_process(lambda: note_sources(output, sources))
    finished = trainer.train()
    note_saved(job)
    network = trainer.averaged_network()
    accelerator.end_training()
    if finished and accelerator.is_main_process:
        text_modules = load_text_modules(job.text_encoder) if job.text_encoder else ()
        with new_folder(output / "pipeline", replaces=True) as folder:
            pipeline(network, *text_modules).save_pretrained(folder)
    return finished


def check_columns(job: TeacherJob, data: ImageData | TokenCache) -> None:
    """A ValueError where data and settings do not say alike what the teacher is to be conditioned on."""
    if not job.text_encoder and not data.class_names and data.texts is not None:
        raise ValueError(
            "there are captions and no labels: name a text_encoder for a teacher conditioned on the captions, or leave "
            "them out (data.text_column=, also where tokens are cached) for an unconditional one"
        )
    if job.text_encoder and data.texts is None:
        raise ValueError("there are no captions for the text_encoder: name their column (data.text_column)")


def encode_captions(job: TeacherJob, data: TokenCache, parent: Path, device: torch.device) -> PromptCache:
    """The captions' encodings, in a folder of `parent`; without the text encoder's staying in memory."""
    assert data.texts is not None
    text_encoder: Any  # transformers declares its `to` as if it took a network
    text_encoder, text_tokenizer = load_text_modules(job.text_encoder)
    folder = write_prompt_cache(parent, text_encoder.to(device), text_tokenizer, data.texts[:])
    return PromptCache(folder, data.tokenizer.config.image_size)


def load_text_modules(name: str) -> tuple[CLIPTextModelWithProjection, CLIPTokenizer]:
    """The text encoder and tokenizer of a CLIP; the half that sees images is left behind."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # or it reports each weight of that half
    try:
        loaded: Any = CLIPTextModelWithProjection.from_pretrained(name, output_loading_info=True)
        text_encoder, found = loaded
        text_tokenizer = CLIPTokenizer.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(f"there is no CLIP at {name} (a folder, or a hub id): {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if found["missing_keys"]:
        raise ValueError(f"the CLIP at {name} lacks {', '.join(sorted(found['missing_keys']))}")
    return text_encoder.eval(), text_tokenizer


def make_denoiser(job: TeacherJob, data: TokenCache, conditions: Conditions) -> Denoiser:
    """An untrained network: MaskGIT's (unconditional where there are no classes), or aMUSEd's for captions."""
    network, tokenizer = job.network, data.tokenizer
    if not isinstance(conditions, PromptCache):
        settings = {key: value for key, value in asdict(network).items() if key != "num_res_blocks"}
        return MaskGITTransformer(tokenizer.codebook_size, len(data.class_names), tokenizer.token_grid, **settings)
    states_width, pooled_width = conditions.text_sizes
    return AmusedDenoiser(
        tokenizer.token_grid,
        {
            "hidden_size": network.hidden_size,
            "hidden_dropout": network.dropout,
            "cond_embed_dim": pooled_width,
            "encoder_hidden_size": states_width,
            "vocab_size": tokenizer.codebook_size + 1,
            "codebook_size": tokenizer.codebook_size,
            "in_channels": network.hidden_size,
            "block_out_channels": network.hidden_size,
            "num_res_blocks": network.num_res_blocks,
            "block_num_heads": network.num_attention_heads,
            "num_hidden_layers": network.num_layers,
            "num_attention_heads": network.num_attention_heads,
            "intermediate_size": network.mlp_size,
        },
    )


def tokenise(job: TeacherJob, data: ImageData, folder: Path) -> TokenCache:
    """The tokens of images, by the patch tokenizer in the folder or one that is fitted and put there."""
    images = data.images()
    for missing in each_once([folder]):  # k-means may not repeat itself to the bit
        with new_folder(missing, shared=True) as staging:
            PatchTokenizer.fit(images, seed=job.training.seed, **asdict(job.tokenizer)).save_pretrained(staging)
    tokenizer = PatchTokenizer.from_pretrained(folder)
    return TokenCache(tokenizer.encode(images), data.labels, data.class_names, data.texts, tokenizer)


class TokenBatches:
    """Batches of a tokenised data set; a pure function of seed, step and places."""

    def __init__(
        self,
        tokens: torch.Tensor | MappedRows,
        conditions: Conditions,
        config: TrainingConfig,
        device: torch.device,
    ):
        self.tokens, self.conditions, self.device = tokens, conditions, device
        self.rows = ShuffledRows(len(tokens), config.batch_size, config.seed)

    def __call__(self, step: int, places: range, generators: list[torch.Generator]) -> tuple[torch.Tensor, Condition]:
        rows = self.rows(step, places)
        return to_device(self.tokens[rows].long(), self.device), self.conditions.condition(rows, self.device)
