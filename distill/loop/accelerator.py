"""The Accelerator of a run, as the launcher and the settings ask for it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from distill.loop.config import TrainingConfig
from distill.loop.launch import asked


def make_accelerator(config: TrainingConfig, output: Path) -> Accelerator:
    """The Accelerator of a run whose trackers write into `output`."""
    if config.tracker == "wandb" and find_spec("wandb") is None:
        raise ValueError("training.tracker=wandb needs the package: pip install 'one-step-mdm[wandb]', or wandb")
    _refuse_other_launches()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=str(output),
    )
    _shard_on_cpu(accelerator)
    if accelerator.is_fsdp2:
        policy = shard_precision(config.mixed_precision, accelerator.device)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    if accelerator.device.type == "cuda" and config.mixed_precision != "no":
        torch.set_float32_matmul_precision("high")  # TF32, which rounds to 2^-11, for the last product
    if config.mixed_precision == "fp16":
        accelerator.native_amp = True  # on a CPU it would run in full precision without a word
    share = config.batch_size / (accelerator.num_processes * config.gradient_accumulation_steps)
    if not share.is_integer():
        raise ValueError(
            f"training.batch_size={config.batch_size} does not divide over {accelerator.num_processes} processes "
            f"and {config.gradient_accumulation_steps} accumulation steps"
        )
    shared = "" if accelerator.num_processes == 1 else ", FSDP2" if accelerator.is_fsdp2 else ", DDP"
    accelerator.print(
        f"{accelerator.num_processes} x {accelerator.device.type}{shared}, mixed precision: {config.mixed_precision}"
    )
    return accelerator


def shard_precision(mixed_precision: str, device: torch.device) -> MixedPrecisionPolicy:
    """Weights are gathered in half precision; gradients are added up, and hidden states handed on, in float32.

    That is what DDP under autocast does. Accelerate's own policy adds gradients up in half precision, and torch's hands
    hidden states on in it. On a CPU weights are gathered as they are: under autocast it has no layer norm of halves.
    """
    if mixed_precision == "no":
        return MixedPrecisionPolicy()
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
    return MixedPrecisionPolicy(
        param_dtype=None if device.type == "cpu" else half,
        reduce_dtype=torch.float32,
        output_dtype=torch.float32,
        cast_forward_inputs=False,
    )


def _refuse_other_launches() -> None:
    """A ValueError where `accelerate launch` was asked for what trains one model at a time."""
    if asked("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError("DeepSpeed trains one model per run, and distillation trains two; use DDP or FSDP2")
    if asked("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP's first version is not supported; ask for the second (fsdp_version: 2)")


def _shard_on_cpu(accelerator: Accelerator) -> None:
    """Let CPU processes that were asked for FSDP2 have it: Accelerate turns FSDP on where there are GPUs alone."""
    if asked("ACCELERATE_USE_FSDP") and accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
